"""Decompositions of our own: ops whose pieces the lowering knows, where PyTorch's table has none or others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten

_VIEWS = (
    "alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
)  # fmt: skip


def _copy_of(view: Callable[..., Any]) -> Callable[..., Any]:
    """The view, and a contiguous copy of it, as eager makes."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        found = view(*args, **kwargs)
        if isinstance(found, Tensor):
            return found.clone(memory_format=torch.contiguous_format)
        return [part.clone(memory_format=torch.contiguous_format) for part in found]

    return copied


def view_copies() -> dict[Any, Callable[..., Any]]:
    """``aten.permute_copy`` and its like, by overload."""
    found: dict[Any, Callable[..., Any]] = {}
    for name in _VIEWS:
        copy, view = getattr(aten, f"{name}_copy", None), getattr(aten, name, None)
        if copy is None or view is None:
            continue
        for overload in copy.overloads():
            if "out" not in overload and overload in view.overloads():
                found[getattr(copy, overload)] = _copy_of(getattr(view, overload))
    return found


def flat_indexing() -> dict[Any, Callable[..., Any]]:
    """Reads and writes at positions of the flattened tensor."""
    return {aten.take.default: _take, aten.put.default: _put}


def _take(x: Tensor, places: Tensor) -> Any:
    return aten.index.Tensor(x.reshape(-1), [places])


def _put(x: Tensor, places: Tensor, source: Tensor, accumulate: bool = False) -> Any:
    if not x.is_contiguous():
        return NotImplemented
    values = source.reshape(places.shape)
    return aten.index_put.default(x.reshape(-1), [places], values, accumulate).reshape(x.shape)


def channels_last_unpooling() -> dict[Any, Callable[..., Any]]:
    """The op whose fake implementation forgets that the result is laid out like the operand."""
    return {aten.max_unpool2d.default: _max_unpool2d}


def _max_unpool2d(x: Tensor, places: Tensor, size: Any) -> Any:
    if x.dim() != 4 or suggest_memory_format(x) is not torch.channels_last:
        return NotImplemented
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, places)]
    return aten.max_unpool2d.default(*plain, size).clone(memory_format=torch.channels_last)


def random_pieces() -> dict[Any, Callable[..., Any]]:
    """Ops that draw, in terms of uniform and normal numbers; those given a generator of their own stay whole."""
    return {
        aten.randint.default: lambda high, size, **options: _randint(0, high, size, **options),
        aten.randint.low: _randint,
        aten.randint_like.default: lambda x, high, **options: _randint_like(x, 0, high, **options),
        aten.randint_like.low_dtype: _randint_like,
        aten.uniform.default: _uniform,
        aten.geometric.default: _geometric,
        aten.normal_functional.default: _normal,
        aten.normal.float_float: _normal_of_size,
        aten.normal.Tensor_Tensor: _normal_of_tensors,
        aten.normal.Tensor_float: _normal_of_tensors,
        aten.normal.float_Tensor: _normal_of_tensors,
        aten.rrelu_with_noise_functional.default: _rrelu,
    }


LEVELS = 2**24
"""Different values of a uniform number in float32."""


def _randint(low: Any, high: Any, size: Any, **options: Any) -> Any:
    dtype = options.pop("dtype", None) or torch.int64
    if not _few(low, high):
        return NotImplemented
    return _spread(torch.rand(size, dtype=torch.float32, device=options.get("device")), low, high, dtype)


def _randint_like(x: Tensor, low: Any, high: Any, **options: Any) -> Any:
    if not _few(low, high) or options.get("memory_format") not in (None, torch.preserve_format):
        return NotImplemented
    return _spread(torch.rand_like(x, dtype=torch.float32), low, high, options.get("dtype") or x.dtype)


def _few(low: Any, high: Any) -> bool:
    """Whether a range of integers is small against the levels of a uniform number, so that all are about as likely."""
    return isinstance(low, int) and isinstance(high, int) and high - low <= LEVELS // 256


def _spread(uniform: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return ((uniform * (high - low)).floor() + low).to(dtype)


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None else torch.randn_like(x) * std + mean


def _normal_of_size(mean: float, std: float, size: Any, *, generator: Any = None, **options: Any) -> Any:
    if generator is not None:
        return NotImplemented
    return torch.randn(size, dtype=options.get("dtype"), device=options.get("device")) * std + mean


def _normal_of_tensors(mean: Any = 0.0, std: Any = 1.0, *, generator: Any = None) -> Any:
    if generator is not None:
        return NotImplemented
    like = mean + torch.zeros_like(std) if isinstance(std, Tensor) else mean
    return torch.randn_like(like) * std + mean


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None else torch.rand_like(x) * (high - low) + low


def _geometric(x: Tensor, p: float, *, generator: Any = None) -> Any:
    if generator is not None or not 0 < p < 1:
        return NotImplemented
    uniform = torch.rand_like(x, dtype=x.dtype if x.dtype.is_floating_point else torch.float32)
    return ((-uniform).log1p() / math.log1p(-p)).floor().add(1).to(x.dtype)


def _rrelu(
    x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    if generator is not None:
        return NotImplemented
    if not training:
        slope = (lower + upper) / 2
        return torch.where(x > 0, x, x * slope), noise.clone()
    drawn = torch.rand_like(x) * (upper - lower) + lower
    noise = torch.where(x <= 0, drawn, torch.ones_like(drawn))
    return x * noise, noise
