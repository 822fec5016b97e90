"""Linear interpolation whose gradient stays one op.

While AOTAutograd traces, PyTorch's interpolation ops are Python code that autograd differentiates piece by piece: the
gradient becomes four scattered, atomic additions for each element of a two-dimensional output. Here the forward stays
in these pieces, which fuse with what is around them, and the gradient is the op that eager PyTorch calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decompositions

aten = torch.ops.aten
_output_size: Callable[..., Any] = decompositions.upsample_compute_output_size

GRADIENTS: dict[Any, Any] = {
    aten.upsample_linear1d.vec: aten.upsample_linear1d_backward.default,
    aten.upsample_bilinear2d.vec: aten.upsample_bilinear2d_backward.default,
    aten.upsample_trilinear3d.vec: aten.upsample_trilinear3d_backward.default,
}
"""Interpolation ops and the ops of their gradients."""

KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)


class _Interpolation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Callable[..., Tensor], gradient: Any, x: Tensor, *how: Any) -> Tensor:
        size, align_corners, scales = how
        ctx.gradient, ctx.how = gradient, (size, list(x.shape), align_corners, *scales)
        return pieces(x, None if any(scales) else size, align_corners, list(scales) if any(scales) else None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, ctx.gradient(grads[0], *ctx.how), None, None, None


def _whole(pieces: Callable[..., Tensor], gradient: Any) -> Callable[..., Tensor]:
    """``pieces`` with ``gradient`` as its derivative, where sizes are constant and the elements have a gradient."""

    def interpolate(x: Tensor, output_size: Any, align_corners: bool, scale_factors: Sequence[float] | None) -> Tensor:
        size = _output_size(x.size(), output_size, scale_factors)
        if not x.is_floating_point() or not all(isinstance(n, int) for n in (*x.shape, *size)):
            return pieces(x, output_size, align_corners, scale_factors)
        scales = tuple(scale_factors) if scale_factors else (None,) * len(size)
        apply: Callable[..., Tensor] = _Interpolation.apply
        return apply(pieces, gradient, x, list(size), align_corners, scales)

    return interpolate


@contextmanager
def whole_gradients() -> Iterator[None]:
    """Inside, tracing keeps the gradients of linear interpolation whole."""
    before = {op: {key: op.py_kernels[key] for key in KEYS if key in op.py_kernels} for op in GRADIENTS}
    try:
        for op, gradient in GRADIENTS.items():
            for key, pieces in before[op].items():
                op.py_kernels[key] = _whole(pieces, gradient)
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in before.items():
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()
