"""Check of a program's inputs against the layouts it was compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dcompile.errors import DCompileError
from dcompile.runtime.externs import describe, is_packed, same_stride

WIDEST_SCALAR_BYTES = 8

ANY_DEVICE = "any"
"""Device of inputs that only library calls read and that they may return elsewhere than they promise: the seeds that
CUDA attention gives its backward lie on the CPU outside of graph capture."""


@dataclass(frozen=True)
class Layout:
    """What the program expects in one input place.

    Attributes:
        dtype, device: of the tensor; ``device`` is a device type or ``ANY_DEVICE``.
        written: the program writes this input or returns memory of it, so it cannot work on a copy.
        library: only library calls read it; it may be in a layout of the library's own (weights packed by oneDNN).
    """

    name: str
    dtype: torch.dtype
    device: str
    written: bool = False
    library: bool = False

    @cached_property
    def misaligned(self) -> int:
        """Address bits that must be 0: an element is aligned to its own size, complex ones to their parts'."""
        return min(self.dtype.itemsize, WIDEST_SCALAR_BYTES) - 1


def fits(tensors: Sequence[torch.Tensor], layouts: Sequence[Layout], shapes: Sequence[tuple[Any, Any]]) -> bool:
    """Whether all tensors have exactly the expected dtype, shape, stride, alignment and no lazy negation. Fast."""
    try:
        for tensor, layout, (shape, stride) in zip(tensors, layouts, shapes, strict=True):
            if (
                tensor.shape != shape
                or tensor.stride() != stride
                or tensor.dtype is not layout.dtype
                or tensor.data_ptr() & layout.misaligned
                or tensor.is_neg()
                or tensor.is_conj()
            ):
                return False
    except RuntimeError:  # a tensor without addressable memory
        return False
    return True


def conform(
    tensors: Sequence[torch.Tensor], layouts: Sequence[Layout], shapes: Sequence[tuple[Any, Any]], program: str
) -> tuple[torch.Tensor, ...]:
    """The tensors as the program needs them: those with other strides, misaligned or lazily negated are copied.

    Raises:
        DCompileError: another dtype, device or shape; or a copy would be needed of an input the program writes.
    """
    ready = []
    for tensor, layout, (shape, stride) in zip(tensors, layouts, shapes, strict=True):
        want = f"{describe(layout.dtype, shape, stride)} on {layout.device}"
        if (
            layout.library
            and is_packed(tensor)
            and tensor.dtype is layout.dtype
            and tuple(tensor.shape) == tuple(shape)
        ):
            ready.append(tensor)
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise DCompileError(f"{program}: input {layout.name} must be a dense tensor {want}, got {tensor!r:.200}")
        same = tensor.dtype is layout.dtype and layout.device in (tensor.device.type, ANY_DEVICE)
        if not same or tuple(tensor.shape) != tuple(shape):
            got = f"{describe(tensor.dtype, tensor.shape, tensor.stride())} on {tensor.device}"
            raise DCompileError(f"{program}: input {layout.name} must be {want}, got {got}; compile for these inputs")
        lazy = tensor.is_neg() or tensor.is_conj()
        if not lazy and same_stride(tensor, stride) and not tensor.data_ptr() & layout.misaligned:
            ready.append(tensor)
            continue
        if layout.written:
            why = "is lazily negated or conjugated" if lazy else f"has strides {list(tensor.stride())} or is misaligned"
            raise DCompileError(f"{program}: input {layout.name} is written in place and must be {want}, but it {why}")
        copy = torch.empty_strided(tuple(shape), tuple(stride), dtype=layout.dtype, device=tensor.device)
        ready.append(copy.copy_(tensor))
    return tuple(ready)
