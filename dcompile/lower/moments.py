"""Mean and variance, and the ops that give them.

On the devices in ``WELFORD_DEVICES`` they are one reduction with three results, which reads its operand once. On others
the mean is one sum and the squared distances from it another, in a second pass. Neither subtracts large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dcompile.ir.expr import Expr, const, load, op, to
from dcompile.ir.nodes import Reduction
from dcompile.ir.types import Size, Value
from dcompile.lower.builder import Lowering, loop_axes, loop_index
from dcompile.lower.pointwise import elementwise
from dcompile.lower.reduction import extent, kept_shape, mean_of, positions, reduced_dims, size_value
from dcompile.lower.table import rule

WELFORD_DEVICES = frozenset({"cpu"})
"""Devices whose printer knows the reduction ``welford``."""


def moments_of(b: Lowering, x: Value, dims: Sequence[int], keepdim: bool = True) -> tuple[Value, Value]:
    """Mean of ``x`` over ``dims`` and sum of squared distances from it, in the compute type; of nothing NaN and 0."""
    dtype = x.dtype.compute
    shape = kept_shape(x.shape, dims)
    if not keepdim:
        shape = tuple(n for d, n in enumerate(shape) if d not in dims)
    mean, squares = (b.temp(name, dtype, shape, x.device) for name in ("mean", "squares"))
    count = extent(x, dims)
    if count == 0:
        return b.pointwise(mean, const(math.nan, dtype)), b.pointwise(squares, const(0, dtype))
    if count == 1:
        where, _ = positions(x, dims, keepdim)
        only = to(load(x.name, where, x.dtype), dtype)
        return b.pointwise(mean, only), b.pointwise(squares, op("sub", only, only))
    if x.device in WELFORD_DEVICES:
        return _welford(b, x, dims, mean, squares, count)
    mean_of(b, x, dims, mean)
    where, raxes = positions(x, dims, keepdim)
    centre = load(mean.name, loop_index(shape), dtype)
    apart = op("sub", to(load(x.name, where, x.dtype), dtype), centre)
    return mean, b.reduction(squares, "sum", raxes, op("mul", apart, apart))


def _welford(
    b: Lowering, x: Value, dims: Sequence[int], mean: Value, squares: Value, count: Size
) -> tuple[Value, Value]:
    """One reduction with mean, squared distances and weight; a count that may be zero gives a NaN mean."""
    dtype, shape = mean.dtype, mean.shape
    where, raxes = positions(x, dims, keepdim=len(shape) == len(x.shape))
    weight = b.temp("weight", dtype, shape, x.device)
    certain = isinstance(count, int)
    raw = mean if certain else b.temp("raw", dtype, shape, x.device)
    b.emit(
        Reduction(
            out=raw, more=(squares, weight), kind="welford", axes=loop_axes(shape), raxes=raxes,
            expr=to(load(x.name, where, x.dtype), dtype), origin=b.origin,
        )
    )  # fmt: skip
    if not certain:
        nothing = const(math.nan, dtype)
        elementwise(b, lambda m, n: op("where", op("eq", n, const(0, dtype)), nothing, m), raw, weight, out=mean)
    return mean, squares


def variance_from(b: Lowering, squares: Value, count: Size, correction: Any, out: Value, root: bool = False) -> Value:
    """The variance of ``count`` elements (its square root with ``root``), given their squared distances from the mean.

    Args:
        correction: what is taken off the count; the difference does not go below 0.
    """
    dtype = squares.dtype
    freedom: Expr
    if isinstance(count, int):
        freedom = const(max(float(count) - correction, 0.0), dtype)
    else:
        freedom = op("maximum", op("sub", size_value(count, dtype), const(correction, dtype)), const(0.0, dtype))

    def finish(v: Expr) -> Expr:
        ratio = op("div", v, freedom)
        return op("sqrt", ratio) if root else ratio

    return elementwise(b, finish, squares, out=out, dtype=dtype)


def _freedom(correction: Any) -> Any:
    return 1 if correction is None else correction


@rule("var.correction", "std.correction", "var.dim", "std.dim")
def var(b: Lowering, x: Value, dim: Any = None, *unbiased: Any, correction: Any = None, keepdim: bool = False) -> Value:
    if unbiased:
        correction = int(bool(unbiased[0]))
    dims = reduced_dims(dim, len(x.shape))
    root = str(b.node.target).startswith("aten.std")
    _, squares = moments_of(b, x, dims, keepdim=len(b.out.shape) == len(x.shape))
    return variance_from(b, squares, extent(x, dims), _freedom(correction), b.out, root)


@rule("var_mean.correction", "std_mean.correction")
def var_mean(
    b: Lowering, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    """Where an element is infinite the mean is NaN like the variance, as in eager."""
    dims = reduced_dims(dim, len(x.shape))
    root = str(b.node.target).startswith("aten.std")
    spread, out = b.out_at(0), b.out_at(1)
    mean, squares = moments_of(b, x, dims, keepdim=len(out.shape) == len(x.shape))
    variance_from(b, squares, extent(x, dims), _freedom(correction), spread, root)

    def with_nan(m: Expr, s: Expr) -> Expr:
        return op("where", op("isnan", s), const(math.nan, mean.dtype), m)

    return spread, elementwise(b, with_nan, mean, squares, out=out, dtype=mean.dtype)
