"""Library calls of generated programs: how their names are found and the helpers that PyTorch has no op for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dcompile.errors import CompilerBug, DCompileError
from dcompile.ir.symbolic import CHECK, RELATIONS
from dcompile.runtime.packed import PACKING
from dcompile.runtime.programs import PROGRAM_OPS
from dcompile.runtime.user_kernels import USER_KERNEL_OPS

LOWEST_I64 = -(2**63)

FAST_CALLS: dict[str, Callable[..., Any]] = {
    "aten.mm.out": torch.mm,
    "aten.addmm.out": torch.addmm,
    "aten.bmm.out": torch.bmm,
    "aten.baddbmm.out": torch.baddbmm,
}
"""Same arguments, half the host time: 1.6 us instead of 3.4 us for a 4 x 4 ``mm`` into given memory."""


def resolve_op(name: str) -> Callable[..., Any]:
    """The callable behind ``"aten.mm.out"`` or ``"dcompile.seeds"``.

    Raises:
        DCompileError: no such op is registered in this process.
    """
    if name.startswith("dcompile."):
        helper = HELPERS.get(name)
        if helper is None:
            raise CompilerBug(f"no runtime helper is called {name!r}; there are {', '.join(sorted(HELPERS))}")
        return helper
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise DCompileError(
            f"the program calls {name}, which is not registered here: import the library that defines it first"
        ) from None
    found = FAST_CALLS.get(name, found)
    if not callable(found):
        raise CompilerBug(f"{name} names no op")
    return found  # type: ignore[no-any-return]


def seeds(count: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """``count`` int64 random numbers of all 64 bits from the device's default generator, shape (count,)."""
    return torch.empty(count, dtype=torch.int64, device=device).random_(LOWEST_I64, None)


def finish(result: torch.Tensor, *kept: torch.Tensor) -> None:
    """Wait for the send or receive that returned ``result``; ``kept`` are the tensors it uses until then."""
    torch.ops._c10d_functional.wait_tensor(result)


def check(left: int, relation: str, right: int, message: str) -> None:
    """Raise what the user's program demands of a number it has learned.

    Raises:
        RuntimeError: ``left`` does not stand in ``relation`` to ``right``; the text is the user's message.
    """
    if not RELATIONS[relation](left, right):
        raise RuntimeError(message)


def check_result(
    result: torch.Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    call: str,
    address: int | None = None,
) -> None:
    """Assert that a library call gave the tensor the program was compiled for.

    Args:
        address: where its first element must be, for calls that write into planned memory.

    Raises:
        CompilerBug: naming ``call`` (op and source line) and what differs.
    """
    if is_packed(result) and result.dtype is dtype:
        return  # only the library reads it, whatever shape it says it has
    if result.dtype is not dtype or tuple(result.shape) != tuple(shape) or not same_stride(result, stride):
        raise CompilerBug(
            f"{call} gave {describe(result.dtype, result.shape, result.stride())}, "
            f"the program expects {describe(dtype, shape, stride)}"
        )
    if address is not None and result.numel() and result.data_ptr() != address:
        raise CompilerBug(f"{call} moved its result out of the memory it was given")


def leaves(result: Any) -> list[Any]:
    """What nested tuples and lists hold, in order."""
    if isinstance(result, tuple | list):
        return [leaf for item in result for leaf in leaves(item)]
    return [result]


def check_number(result: object, promised: object, call: str) -> None:
    """Assert that a library call returned the number that stands for its result in the program.

    Raises:
        DCompileError: naming ``call`` (op and source line); its fake implementation does not tell the truth.
    """
    if result != promised and not (result != result and promised != promised):
        raise DCompileError(
            f"{call} returned {result}, but {promised} from its fake implementation, and the program was compiled for "
            "that. Instead: have the fake implementation return the same number, or return a tensor"
        )


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is in a layout of the CPU library's own: only its calls can read it."""
    return isinstance(tensor, torch.Tensor) and tensor.layout is torch._mkldnn  # type: ignore[attr-defined]


def same_stride(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether ``tensor`` addresses its elements as ``stride`` says; dimensions of size 1 do not count."""
    return not tensor.numel() or all(
        size == 1 or have == want for size, have, want in zip(tensor.shape, tensor.stride(), stride, strict=True)
    )


def describe(dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} with strides {list(stride)}"


def resize_storage(tensor: torch.Tensor, nbytes: int) -> None:
    """Give the storage of ``tensor`` another number of bytes, 0 to give them back. New bytes hold anything."""
    tensor.untyped_storage().resize_(nbytes)


HELPERS: dict[str, Callable[..., Any]] = {
    "dcompile.resize_storage": resize_storage,
    "dcompile.seeds": seeds,
    "dcompile.finish": finish,
    CHECK: check,
    **PROGRAM_OPS,
    **PACKING,
    **USER_KERNEL_OPS,
}
