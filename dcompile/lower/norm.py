"""Normalisation layers and their gradients, for graphs in which they are left whole.

All statistics are computed in f32 (f64 for f64 inputs), see ``lower.moments``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from dcompile.ir.expr import Expr, const, load, op, to
from dcompile.ir.index import FloorDiv, product
from dcompile.ir.types import Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index
from dcompile.lower.moments import moments_of, variance_from
from dcompile.lower.pointwise import elementwise, literal
from dcompile.lower.reduction import extent, fold, kept_shape, mean_of, positions
from dcompile.lower.table import NoRule, rule
from dcompile.lower.view import reshape_index


def _statistics(b: Lowering, x: Value, dims: Sequence[int], eps: float) -> tuple[Value, Value, Value]:
    """Mean, squared distances from it and ``1 / sqrt(variance + eps)`` over ``dims``, kept at size 1, in the compute
    type."""
    mean, squares = moments_of(b, x, dims)
    var = variance_from(b, squares, extent(x, dims), 0, b.temp("var", mean.dtype, mean.shape, x.device))
    rstd = b.temp("rstd", mean.dtype, mean.shape, x.device)
    elementwise(b, lambda v: op("rsqrt", op("add", v, literal(v, eps))), var, out=rstd)
    return mean, squares, rstd


def _reshaped(b: Lowering, x: Value, shape: tuple[Size, ...], suffix: str) -> Value:
    out = b.temp(suffix, x.dtype, shape, x.device)
    return b.view(out, x, reshape_index(x.shape, shape, b.sizes))


def _emit_copy(b: Lowering, out: Value, x: Value) -> Value:
    return b.pointwise(out, load(x.name, reshape_index(x.shape, out.shape, b.sizes), x.dtype))


@rule("native_layer_norm")
def layer_norm(
    b: Lowering, x: Value, shape: Any, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    dims = tuple(range(len(x.shape) - len(shape), len(x.shape)))
    mean, _, rstd = _statistics(b, x, dims, eps)

    def normalise(v: Expr, m: Expr, r: Expr, *affine: Expr) -> Expr:
        rest = list(affine)
        v = op("mul", op("sub", v, m), r)
        v = op("mul", v, rest.pop(0)) if weight is not None else v
        return op("add", v, rest.pop(0)) if bias is not None else v

    affine = [p for p in (weight, bias) if p is not None]
    out = elementwise(b, normalise, x, mean, rstd, *affine, out=b.out_at(0))
    return out, _emit_copy(b, b.out_at(1), mean), _emit_copy(b, b.out_at(2), rstd)


def _input_gradient(
    b: Lowering, out: Value, grad: Value, scale: Value | None, normal: Value, rstd: Value, dims: Sequence[int]
) -> Value:
    """``rstd * (g - mean(g) - xhat * mean(g * xhat))`` with ``g = grad * scale``: the gradient of normalisation."""
    dtype = normal.dtype
    scaled = b.temp("scaled", dtype, normal.shape, normal.device)
    operands = (grad,) if scale is None else (grad, scale)
    elementwise(b, lambda g, *w: op("mul", g, w[0]) if w else g, *operands, out=scaled)
    along = b.temp("along", dtype, normal.shape, normal.device)
    elementwise(b, lambda g, v: op("mul", g, v), scaled, normal, out=along)
    kept = kept_shape(normal.shape, dims)
    mean_g = mean_of(b, scaled, dims, b.temp("mean_g", dtype, kept, normal.device))
    mean_gx = mean_of(b, along, dims, b.temp("mean_gx", dtype, kept, normal.device))

    def formula(g: Expr, v: Expr, r: Expr, m: Expr, c: Expr) -> Expr:
        return op("mul", r, op("sub", op("sub", g, m), op("mul", v, c)))

    return elementwise(b, formula, scaled, normal, rstd, mean_g, mean_gx, out=out)


@rule("native_layer_norm_backward")
def layer_norm_backward(
    b: Lowering, grad: Value, x: Value, shape: Any, mean: Value, rstd: Value,
    weight: Value | None, bias: Value | None, wanted: Any,
) -> tuple[Value | None, Value | None, Value | None]:  # fmt: skip
    rank, lead = len(x.shape), len(x.shape) - len(shape)
    inner, outer = tuple(range(lead, rank)), tuple(range(lead))
    dtype = x.dtype.compute
    normal = b.temp("normal", dtype, x.shape, x.device)
    elementwise(b, lambda v, m, r: op("mul", op("sub", v, m), r), x, mean, rstd, out=normal)
    grads: list[Value | None] = [None, None, None]
    if wanted[0]:
        grads[0] = _input_gradient(b, b.out_at(0), grad, weight, normal, rstd, inner)
    if wanted[1] and weight is not None:
        along = b.temp("along", dtype, x.shape, x.device)
        elementwise(b, lambda g, v: op("mul", g, v), grad, normal, out=along)
        grads[1] = fold(b, b.out_at(1), "sum", along, outer, dtype)
    if wanted[2] and bias is not None:
        grads[2] = fold(b, b.out_at(2), "sum", grad, outer, dtype)
    return grads[0], grads[1], grads[2]


def _per_channel(p: Value, rank: int) -> tuple[sympy.Expr, ...]:
    """Position of a per-channel vector at ``(i0, i1, …)`` of a tensor whose channels are dimension 1."""
    return (ZERO,) if p.shape[0] == 1 else (loop_index((2,) * rank)[1],)


def _grouped(x: Value, groups: int) -> tuple[Size, ...]:
    channels = x.shape[1]
    each = channels // groups if isinstance(channels, int) else FloorDiv(channels, sympy.Integer(groups))
    return (x.shape[0], groups, each, product(x.shape[2:]))


@rule("native_group_norm")
def group_norm(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, n: Any, c: Any, hw: Any, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    cut = _reshaped(b, x, _grouped(x, groups), "groups")
    mean, _, rstd = _statistics(b, cut, (2, 3), eps)
    out, dtype = b.out_at(0), x.dtype.compute
    back = reshape_index(cut.shape, x.shape, b.sizes)
    at = (back[0], back[1], ZERO, ZERO)
    v = op("sub", b.element(x, x.shape, dtype), load(mean.name, at, dtype))
    v = op("mul", v, load(rstd.name, at, dtype))
    for name, p in (("mul", weight), ("add", bias)):
        if p is not None:
            v = op(name, v, to(load(p.name, _per_channel(p, len(x.shape)), p.dtype), dtype))
    b.pointwise(out, v)
    return out, _emit_copy(b, b.out_at(1), mean), _emit_copy(b, b.out_at(2), rstd)


# batch norm ----------------------------------------------------------------------------------------------------------


def _channel_shape(x: Value) -> tuple[Size, ...]:
    return tuple(n if d == 1 else 1 for d, n in enumerate(x.shape))


def _batch_norm_apply(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, mean: Value, rstd: Value
) -> Value:
    """``(x - mean) * rstd * weight + bias`` into the first output; statistics are vectors or kept at size 1."""
    out, dtype, rank = b.out_at(0), x.dtype.compute, len(x.shape)

    def channel(p: Value) -> Expr:
        where = _per_channel(p, rank) if len(p.shape) == 1 else tuple(
            ZERO if n == 1 else i for i, n in zip(loop_index(x.shape), p.shape, strict=True)
        )  # fmt: skip
        return to(load(p.name, where, p.dtype), dtype)

    v = op("mul", op("sub", b.element(x, x.shape, dtype), channel(mean)), channel(rstd))
    v = op("mul", v, channel(weight)) if weight is not None else v
    return b.pointwise(out, op("add", v, channel(bias)) if bias is not None else v)


def _running_rstd(b: Lowering, running_var: Value, eps: float) -> Value:
    dtype = running_var.dtype.compute
    rstd = b.temp("rstd", dtype, running_var.shape, running_var.device)
    return elementwise(b, lambda v: op("rsqrt", op("add", v, literal(v, eps))), running_var, out=rstd)


@rule("_native_batch_norm_legit_functional")
def batch_norm(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value, running_var: Value,
    training: bool, momentum: float, eps: float,
) -> tuple[Value, Value, Value, Value, Value]:  # fmt: skip
    """Gives (out, saved mean, saved rstd, new running mean, new running variance)."""
    if not training:
        rstd = _running_rstd(b, running_var, eps)
        _batch_norm_apply(b, x, weight, bias, running_mean, rstd)
        for position in (1, 2):
            b.pointwise(b.out_at(position), const(0, b.out_at(position).dtype))
        _emit_copy(b, b.out_at(3), running_mean)
        _emit_copy(b, b.out_at(4), running_var)
    else:
        _batch_norm_training(b, x, weight, bias, running_mean, running_var, momentum, eps)
    return b.out_at(0), b.out_at(1), b.out_at(2), b.out_at(3), b.out_at(4)


def _batch_norm_training(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value, running_var: Value,
    momentum: float, eps: float,
) -> None:  # fmt: skip
    dims = tuple(d for d in range(len(x.shape)) if d != 1)
    mean, squares, rstd = _statistics(b, x, dims, eps)
    _batch_norm_apply(b, x, weight, bias, mean, rstd)
    _emit_copy(b, b.out_at(1), mean)
    _emit_copy(b, b.out_at(2), rstd)
    dtype = mean.dtype
    unbiased = b.temp("unbiased", dtype, _channel_shape(x), x.device)
    variance_from(b, squares, extent(x, dims), 1, unbiased)
    for position, running, fresh in ((3, running_mean, mean), (4, running_var, unbiased)):
        at = tuple(ZERO if d != 1 else loop_index(b.out_at(position).shape)[0] for d in range(len(x.shape)))
        old = op("mul", b.element(running, running.shape, dtype), const(1 - momentum, dtype))
        b.pointwise(b.out_at(position), op("add", old, op("mul", load(fresh.name, at, dtype), const(momentum, dtype))))


@rule("_native_batch_norm_legit_no_training")
def batch_norm_inference(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, running_mean: Value, running_var: Value,
    momentum: float, eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    _batch_norm_apply(b, x, weight, bias, running_mean, _running_rstd(b, running_var, eps))
    for out in b.outs[1:]:
        if out is not None:
            b.pointwise(out, const(0, out.dtype))
    return b.outs


@rule("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    b: Lowering, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, Value, Value]:
    mean, _, rstd = _statistics(b, x, tuple(d for d in range(len(x.shape)) if d != 1), eps)
    _batch_norm_apply(b, x, weight, bias, mean, rstd)
    return b.out_at(0), _emit_copy(b, b.out_at(1), mean), _emit_copy(b, b.out_at(2), rstd)


@rule("native_batch_norm_backward")
def batch_norm_backward(
    b: Lowering, grad: Value, x: Value, weight: Value | None, running_mean: Value | None, running_var: Value | None,
    saved_mean: Value | None, saved_rstd: Value | None, training: bool, eps: float, wanted: Any,
) -> tuple[Value | None, Value | None, Value | None]:  # fmt: skip
    """Three-term gradient in training; a plain scaling by the running statistics otherwise."""
    dims, dtype = tuple(d for d in range(len(x.shape)) if d != 1), x.dtype.compute
    if training and saved_mean is not None and saved_rstd is not None:
        mean, rstd = saved_mean, saved_rstd
    elif not training and running_mean is not None and running_var is not None:
        mean, rstd = running_mean, _running_rstd(b, running_var, eps)
    else:
        raise NoRule
    shape = _channel_shape(x)
    mean, rstd = _reshaped(b, mean, shape, "mean"), _reshaped(b, rstd, shape, "rstd_kept")
    scale = None if weight is None else _reshaped(b, weight, shape, "weight")
    normal = b.temp("normal", dtype, x.shape, x.device)
    elementwise(b, lambda v, m, r: op("mul", op("sub", v, m), r), x, mean, rstd, out=normal)
    grads: list[Value | None] = [None, None, None]
    if wanted[0] and training:
        grads[0] = _input_gradient(b, b.out_at(0), grad, scale, normal, rstd, dims)
    elif wanted[0]:
        factors = (grad, rstd) if scale is None else (grad, rstd, scale)
        grads[0] = elementwise(
            b, lambda g, r, *w: op("mul", op("mul", g, r), w[0]) if w else op("mul", g, r), *factors, out=b.out_at(0)
        )
    if wanted[1] and b.outs[1] is not None:
        where, raxes = positions(x, dims, keepdim=False)
        product_ = op("mul", to(load(grad.name, where, grad.dtype), dtype), load(normal.name, where, dtype))
        grads[1] = b.reduction(b.out_at(1), "sum", raxes, product_)
    if wanted[2] and b.outs[2] is not None:
        grads[2] = fold(b, b.out_at(2), "sum", grad, dims, dtype)
    return grads[0], grads[1], grads[2]
