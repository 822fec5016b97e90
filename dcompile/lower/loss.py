"""Loss kernels that decompositions may leave whole: negative log likelihood and squared error."""

from __future__ import annotations

import sympy

from dcompile.ir.expr import Expr, bound, const, index, load, masked, op, to
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index, reduce_axes
from dcompile.lower.indexing import wrapped
from dcompile.lower.pointwise import elementwise
from dcompile.lower.reduction import size_value
from dcompile.lower.table import NoRule, rule

_NONE, _MEAN, _SUM = 0, 1, 2
"""ATen's codes of loss reductions."""


def _picked(x: Value, row: sympy.Expr, label: Expr, counted: Expr, dtype: DType) -> Expr:
    """``x[row, label]`` where ``counted``; an ignored label is never looked up."""
    where = (row, bound(0)) if len(x.shape) == 2 else (bound(0),)
    safe = op("where", counted, label, const(0, label.dtype))
    place = wrapped(safe, x.shape[-1])
    return masked(counted, to(load(x.name, where, x.dtype, (place,)), dtype), const(0, dtype))


def _row(x: Value, target: Value, var: sympy.Expr) -> tuple[Expr, sympy.Expr]:
    """The label of a row, and the row's position."""
    return load(target.name, (var,) if target.shape else (), target.dtype), var


def _weight(weight: Value | None, label: Expr, counted: Expr, dtype: DType) -> Expr:
    """The label's class weight, 0 for an ignored label."""
    if weight is None:
        return to(counted, dtype)
    safe = op("where", counted, label, const(0, label.dtype))
    place = wrapped(safe, weight.shape[0])
    return masked(counted, to(load(weight.name, (bound(0),), weight.dtype, (place,)), dtype), const(0, dtype))


@rule("nll_loss_forward")
def nll_loss(
    b: Lowering, x: Value, target: Value, weight: Value | None, reduction: int, ignore: int
) -> tuple[Value, Value]:
    """Gives the loss and the total weight."""
    out, total, dtype = b.out_at(0), b.out_at(1), x.dtype.compute
    if reduction == _NONE and len(x.shape) == 2:
        label, row = _row(x, target, loop_index(target.shape)[0])
        counted = op("ne", label, const(ignore, label.dtype))
        term = op("mul", _picked(x, row, label, counted, dtype), _weight(weight, label, counted, dtype))
        b.pointwise(total, const(0, total.dtype))
        return b.pointwise(out, op("neg", term)), total
    rows = x.shape[0] if len(x.shape) == 2 else 1
    raxes = reduce_axes((rows,))
    label, row = _row(x, target, ZERO if rows == 1 else raxes[0][0])
    counted = op("ne", label, const(ignore, label.dtype))
    share = _weight(weight, label, counted, dtype)
    term = op("neg", op("mul", _picked(x, row, label, counted, dtype), share))
    wide_total = b.temp("weights", dtype, (), x.device)
    b.reduction(wide_total, "sum", raxes, share)
    elementwise(b, lambda v: v, wide_total, out=total)
    if reduction != _MEAN:
        return b.reduction(out, "sum", raxes, term), total
    summed = b.reduction(b.temp("sum", dtype, (), x.device), "sum", raxes, term)
    return elementwise(b, lambda s, w: op("div", s, w), summed, wide_total, out=out), total


@rule("nll_loss_backward")
def nll_loss_backward(
    b: Lowering, grad: Value, x: Value, target: Value, weight: Value | None, reduction: int, ignore: int, total: Value
) -> Value:
    """``-weight[label] * grad`` (divided by the total weight for a mean) at each row's label, 0 elsewhere."""
    if len(x.shape) != 2:
        raise NoRule
    out, dtype = b.out, x.dtype.compute
    row, column = loop_index(x.shape)
    label = load(target.name, (row,), target.dtype)
    counted = op("ne", label, const(ignore, label.dtype))
    at_row = load(grad.name, (row,) if grad.shape else (), grad.dtype)
    slope = op("neg", op("mul", to(at_row, dtype), _weight(weight, label, counted, dtype)))
    if reduction == _MEAN:
        slope = op("div", slope, to(load(total.name, (), total.dtype), dtype))
    hit = op("and", counted, op("eq", to(label, DType.I64), index(column)))
    return b.pointwise(out, op("where", hit, slope, const(0, dtype)))


@rule("mse_loss")
def mse_loss(b: Lowering, x: Value, y: Value, reduction: int = _MEAN) -> Value:
    out, dtype = b.out, b.out.dtype.compute
    if x.shape != y.shape:
        raise NoRule

    def square(v: Expr, w: Expr) -> Expr:
        apart = op("sub", v, w)
        return op("mul", apart, apart)

    if reduction == _NONE:
        return elementwise(b, square, x, y)
    raxes = reduce_axes(x.shape)
    where = tuple(ZERO if n == 1 else var for var, n in raxes)
    body = square(to(load(x.name, where, x.dtype), dtype), to(load(y.name, where, y.dtype), dtype))
    summed = b.reduction(out if reduction == _SUM else b.temp("sum", dtype, (), x.device), "sum", raxes, body)
    if reduction == _SUM:
        return summed
    return elementwise(b, lambda v: op("div", v, size_value(x.numel, dtype)), summed)


@rule("mse_loss_backward")
def mse_loss_backward(b: Lowering, grad: Value, x: Value, y: Value, reduction: int) -> Value:
    out, dtype = b.out, b.out.dtype.compute

    def slope(g: Expr, v: Expr, w: Expr) -> Expr:
        twice = op("mul", const(2.0, dtype), op("sub", v, w))
        if reduction == _MEAN:
            twice = op("div", twice, size_value(x.numel, dtype))
        return op("mul", twice, g)

    return elementwise(b, slope, grad, x, y, out=out)
