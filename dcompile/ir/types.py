"""Value types of the IR: element types, tensor values and where they come from. No communication in this package."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import sympy
import torch
from torch import dtype as TorchDType

Size: TypeAlias = int | sympy.Expr
"""A dimension, stride or byte count: a plain int when static, a sympy expression over size symbols otherwise."""


class DType(Enum):
    """Element type; the value is its name in the IR's text form."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"
    C32 = "c32"
    C64 = "c64"
    C128 = "c128"
    U64 = "u64"

    __hash__ = object.__hash__  # members are singletons: identity is what equality is, and costs no call

    @property
    def torch(self) -> TorchDType:
        """The same type in PyTorch."""
        return _TO_TORCH[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _TO_TORCH[self].itemsize

    @property
    def is_float(self) -> bool:
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_low_precision(self) -> bool:
        """16-bit floats: arithmetic on them is done in f32 (see ``compute``)."""
        return self in (DType.F16, DType.BF16)

    @property
    def is_int(self) -> bool:
        """Integers, bool excluded."""
        return self in (DType.I64, DType.I32, DType.I16, DType.I8, DType.U8)

    @property
    def is_complex(self) -> bool:
        return self in (DType.C32, DType.C64, DType.C128)

    @property
    def library_only(self) -> bool:
        """No loop computes with it: library calls make it and take it (attention's random state is a u64)."""
        return self.is_complex or self is DType.U64

    @property
    def compute(self) -> DType:
        """The type arithmetic on this type is carried out in."""
        return DType.F32 if self.is_low_precision else self

    @staticmethod
    def of(dtype: TorchDType) -> DType | None:
        """The IR type of a torch dtype, or None if the IR has none (float8, quantised, bits)."""
        return _FROM_TORCH.get(dtype)


_TO_TORCH: dict[DType, TorchDType] = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
    DType.C32: torch.complex32,
    DType.C64: torch.complex64,
    DType.C128: torch.complex128,
    DType.U64: torch.uint64,
}
_FROM_TORCH = {t: d for d, t in _TO_TORCH.items()}


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        ops: names of the source-graph ops it was made from, e.g. ``("aten.exp.default",)``; unions after fusion.
        source: the user's line, ``"train.py:41"``, or "" when unknown.
        stack: the frames that led there, as Python prints them; "" unless ``Options.tracebacks`` asks for them.
    """

    ops: tuple[str, ...] = ()
    source: str = ""
    stack: str = ""

    def __or__(self, other: Origin) -> Origin:
        """The union: ops in order without repeats, the first known source line and the stack that goes with it."""
        first = self if self.source else other
        return Origin(tuple(dict.fromkeys(self.ops + other.ops)), first.source, first.stack)


@dataclass(frozen=True)
class Def:
    """Anything a node defines: a tensor value here, a pending collective in ``collectives``."""

    name: str


@dataclass(frozen=True)
class Number(Def):
    """An integer that a library call tells while the program runs: the value of the size symbol of that name.

    Attributes:
        hint: a value it may have, for decisions that may be wrong without being unsafe.
        at: position of the number among what the call returns; None if it is found in the layout of a tensor there.
    """

    hint: int
    at: int | None = None


@dataclass(frozen=True)
class Value(Def):
    """A tensor.

    Attributes:
        dtype: element type.
        shape: sizes, outermost first.
        stride: elements between neighbours along each dimension; the layout eager PyTorch would give
            until a layout decision changes it (only loop outputs that no one outside sees may change).
        device: device type, ``"cpu"`` or ``"cuda"``; the index is run-time data.
    """

    dtype: DType
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            raise ValueError(f"{self.name}: {len(self.shape)} sizes but {len(self.stride)} strides")

    @property
    def numel(self) -> Size:
        total: Size = 1
        for size in self.shape:
            total = total * size
        return total

    @property
    def storage_elements(self) -> Size:
        """Elements from the first to the last one addressed, 0 when empty."""
        if any(size == 0 for size in self.shape):
            return 0
        last: Size = 0
        for size, stride in zip(self.shape, self.stride, strict=True):
            last = last + (size - 1) * stride
        return last + 1

    @property
    def nbytes(self) -> Size:
        """Bytes of storage this value spans."""
        return self.storage_elements * self.dtype.itemsize


def contiguous_stride(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Row-major strides as eager PyTorch gives them: a dimension of size 0 counts as 1."""
    stride: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        stride.append(step)
        step = step * (1 if size == 0 else size)
    return tuple(reversed(stride))
