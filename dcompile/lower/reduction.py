"""Reductions and what is built on them: means, variances, norms, softmax.

16-bit floats are accumulated in f32; intermediate results stay in f32 and are rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from dcompile.ir.expr import Expr, const, index, load, op, to
from dcompile.ir.index import product
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType, Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index, reduce_axes
from dcompile.lower.pointwise import elementwise, literal
from dcompile.lower.table import NoRule, rule


def reduced_dims(dim: Any, rank: int) -> tuple[int, ...]:
    """The dimensions to reduce, ascending; None and the empty list mean all."""
    if dim is None or dim == ():
        return tuple(range(rank))
    dims = dim if isinstance(dim, tuple) else (dim,)
    return tuple(sorted({int(d) % rank if rank else 0 for d in dims} if rank else set()))


def kept_shape(shape: Sequence[Size], dims: Sequence[int]) -> tuple[Size, ...]:
    """``shape`` with the reduced dimensions at size 1."""
    return tuple(1 if d in dims else n for d, n in enumerate(shape))


def positions(x: Value, dims: Sequence[int], keepdim: bool) -> tuple[tuple[sympy.Expr, ...], tuple[Axis, ...]]:
    """Index into ``x`` and reduction axes when ``dims`` are folded away."""
    raxes = reduce_axes([x.shape[d] for d in dims])
    kept = [d for d in range(len(x.shape)) if keepdim or d not in dims]
    here = dict(zip(kept, loop_index([1 if d in dims else x.shape[d] for d in kept]), strict=True))
    inner = {d: ZERO if size == 1 else var for d, (var, size) in zip(dims, raxes, strict=True)}
    return tuple(inner[d] if d in inner else here[d] for d in range(len(x.shape))), raxes


def fold(
    b: Lowering,
    out: Value,
    kind: str,
    x: Value,
    dims: Sequence[int],
    dtype: DType | None = None,
    body: Callable[[Expr], Expr] = lambda v: v,
) -> Value:
    """``out = fold(kind, body(x))`` over ``dims``, with ``x`` converted to ``dtype`` (None: its own) first."""
    where, raxes = positions(x, dims, keepdim=len(out.shape) == len(x.shape))
    loaded = load(x.name, where, x.dtype)
    return b.reduction(out, kind, raxes, body(loaded if dtype is None else to(loaded, dtype)))


def extent(x: Value, dims: Sequence[int]) -> Size:
    """Number of elements folded into one."""
    return product(tuple(x.shape[d] for d in dims))


def size_value(size: Any, dtype: DType) -> Expr:
    return const(size, dtype) if isinstance(size, int | float) else to(index(size), dtype)


@rule("sum", "sum.dim_IntList")
def sum_(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return fold(b, b.out, "sum", x, reduced_dims(dim, len(x.shape)), b.out.dtype.compute)


@rule("prod", "prod.dim_int")
def prod(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return fold(b, b.out, "prod", x, reduced_dims(dim, len(x.shape)), b.out.dtype.compute)


def mean_of(b: Lowering, x: Value, dims: Sequence[int], out: Value) -> Value:
    """The arithmetic mean over ``dims`` into ``out``; of nothing it is NaN."""
    dtype = out.dtype.compute
    total = fold(b, b.temp("sum", dtype, out.shape, out.device), "sum", x, dims, dtype)
    return elementwise(b, lambda v: op("div", v, size_value(extent(x, dims), dtype)), total, out=out)


@rule("mean", "mean.dim")
def mean(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return mean_of(b, x, reduced_dims(dim, len(x.shape)), b.out)


@rule("amax", "amin")
def extremum(b: Lowering, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    kind = "max" if "amax" in str(b.node.target) else "min"
    return fold(b, b.out, kind, x, reduced_dims(dim, len(x.shape)))


@rule("max", "min")
def extremum_of_all(b: Lowering, x: Value) -> Value:
    kind = str(b.node.target).split(".")[1]
    if 0 in x.shape:
        raise NoRule  # the library reports it
    return fold(b, b.out, kind, x, tuple(range(len(x.shape))))


@rule("max.dim", "min.dim")
def extremum_and_place(b: Lowering, x: Value, dim: Any, keepdim: bool = False) -> tuple[Value, Value]:
    kind = str(b.node.target).split(".")[1]
    dims = reduced_dims(dim, len(x.shape))
    values = fold(b, b.out_at(0), kind, x, dims)
    return values, fold(b, b.out_at(1), f"arg{kind}", x, dims)


@rule("argmax", "argmin")
def place(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    kind = str(b.node.target).split(".")[1]
    if x.dtype is DType.BOOL or (0 in x.shape and dim is None):
        raise NoRule
    return fold(b, b.out, kind, x, reduced_dims(dim, len(x.shape)))


@rule("any", "any.dim", "any.dims")
def any_(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _truth(b, x, reduced_dims(dim, len(x.shape)), every=False)


@rule("all", "all.dim", "all.dims")
def all_(b: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return _truth(b, x, reduced_dims(dim, len(x.shape)), every=True)


def _truth(b: Lowering, x: Value, dims: Sequence[int], every: bool) -> Value:
    out = b.out
    if not every and out.dtype is DType.BOOL:
        return fold(b, out, "any", x, dims, DType.BOOL)
    found = b.temp("any", DType.BOOL, out.shape, out.device)
    fold(b, found, "any", x, dims, DType.BOOL, lambda v: op("not", v) if every else v)
    return elementwise(b, lambda v: to(op("not", v) if every else v, out.dtype), found, out=out, dtype=DType.BOOL)


# norms ---------------------------------------------------------------------------------------------------------------


def _power(v: Expr, order: float) -> Expr:
    magnitude = op("abs", v)
    if order == 1:
        return magnitude
    return op("mul", v, v) if order == 2 else op("pow", magnitude, literal(v, order))


@rule("linalg_vector_norm")
def vector_norm(
    b: Lowering, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    out, dims = b.out, reduced_dims(dim, len(x.shape))
    inner = out.dtype.compute
    temp = b.temp("folded", inner, out.shape, out.device)
    if math.isinf(order):
        fold(b, temp, "max" if order > 0 else "min", x, dims, inner, lambda v: op("abs", v))
        return elementwise(b, lambda v: v, temp, out=out)
    if order == 0:
        fold(b, temp, "sum", x, dims, inner, lambda v: to(op("ne", v, literal(v, 0)), inner))
        return elementwise(b, lambda v: v, temp, out=out)
    fold(b, temp, "sum", x, dims, inner, lambda v: _power(v, order))

    def root(v: Expr) -> Expr:
        if order == 1:
            return v
        return op("sqrt", v) if order == 2 else op("pow", v, literal(v, 1.0 / order))

    return elementwise(b, root, temp, out=out)


@rule("norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype")
def norm_dim(b: Lowering, x: Value, order: Any, dim: Any, keepdim: bool = False, dtype: Any = None) -> Value:
    return vector_norm(b, x, 2 if order is None else order, dim, keepdim)


@rule("norm.Scalar")
def norm(b: Lowering, x: Value, order: Any = 2) -> Value:
    return vector_norm(b, x, order)


# softmax -------------------------------------------------------------------------------------------------------------


def _shifted(b: Lowering, x: Value, dims: Sequence[int], dtype: DType) -> tuple[Value, Value]:
    """The maximum over ``dims`` (kept at size 1) and ``sum(exp(x - maximum))``."""
    kept = kept_shape(x.shape, dims)
    top = fold(b, b.temp("max", x.dtype, kept, x.device), "max", x, dims)
    where, raxes = positions(x, dims, keepdim=True)
    at_top = tuple(ZERO if n == 1 else i for i, n in zip(where, kept, strict=True))
    apart = op("sub", to(load(x.name, where, x.dtype), dtype), to(load(top.name, at_top, x.dtype), dtype))
    total = b.reduction(b.temp("sum", dtype, kept, x.device), "sum", raxes, op("exp", apart))
    return top, total


@rule("_softmax")
def softmax(b: Lowering, x: Value, dim: Any, half_to_float: bool = False) -> Value:
    """``exp(x - max) / sum(exp(x - max))``; the exponentials are computed once and kept in the compute type."""
    dims, dtype = reduced_dims(dim, len(x.shape)), b.out.dtype.compute
    kept = kept_shape(x.shape, dims)
    top = fold(b, b.temp("max", x.dtype, kept, x.device), "max", x, dims)
    exps = b.temp("exp", dtype, x.shape, x.device)
    elementwise(b, lambda v, m: op("exp", op("sub", v, m)), x, top, out=exps)
    total = fold(b, b.temp("sum", dtype, kept, x.device), "sum", exps, dims)
    return elementwise(b, lambda e, s: op("div", e, s), exps, total)


@rule("_log_softmax")
def log_softmax(b: Lowering, x: Value, dim: Any, half_to_float: bool = False) -> Value:
    dtype = b.out.dtype.compute
    top, total = _shifted(b, x, reduced_dims(dim, len(x.shape)), dtype)
    return elementwise(b, lambda v, m, s: op("sub", op("sub", v, m), op("log", s)), x, top, total)


@rule("_softmax_backward_data")
def softmax_backward(b: Lowering, grad: Value, y: Value, dim: Any, input_dtype: Any) -> Value:
    dims, dtype = reduced_dims(dim, len(y.shape)), y.dtype.compute
    product_ = b.temp("product", dtype, y.shape, y.device)
    elementwise(b, lambda g, v: op("mul", g, v), grad, y, out=product_)
    total = fold(b, b.temp("sum", dtype, kept_shape(y.shape, dims), y.device), "sum", product_, dims)
    return elementwise(b, lambda g, v, s: op("mul", op("sub", g, s), v), grad, y, total, dtype=dtype)


@rule("_log_softmax_backward_data")
def log_softmax_backward(b: Lowering, grad: Value, y: Value, dim: Any, input_dtype: Any) -> Value:
    dims, dtype = reduced_dims(dim, len(y.shape)), y.dtype.compute
    total = fold(b, b.temp("sum", dtype, kept_shape(y.shape, dims), y.device), "sum", grad, dims, dtype)
    return elementwise(b, lambda g, v, s: op("sub", g, op("mul", op("exp", v), s)), grad, y, total, dtype=dtype)


@rule("logsumexp")
def logsumexp(b: Lowering, x: Value, dim: Any, keepdim: bool = False) -> Value:
    """``log(sum(exp(x - max))) + max``, with an infinite maximum replaced by 0 as eager does."""
    out, dims, dtype = b.out, reduced_dims(dim, len(x.shape)), b.out.dtype.compute
    if not x.dtype.is_float:
        raise NoRule
    top = fold(b, b.temp("max", x.dtype, out.shape, x.device), "max", x, dims)
    finite = b.temp("shift", dtype, out.shape, x.device)

    def cut(v: Expr) -> Expr:
        return op("where", op("isinf", v), literal(v, 0.0), v)

    elementwise(b, cut, top, out=finite)
    where, raxes = positions(x, dims, keepdim=len(out.shape) == len(x.shape))
    apart = op("sub", to(load(x.name, where, x.dtype), dtype), load(finite.name, loop_index(out.shape), dtype))
    total = b.reduction(b.temp("sum", dtype, out.shape, x.device), "sum", raxes, op("exp", apart))
    return elementwise(b, lambda s, m: op("add", op("log", s), m), total, finite, out=out)
