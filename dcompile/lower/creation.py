"""Tensors from nothing: constants, ranges, triangles, uninitialised memory."""

from __future__ import annotations

from typing import Any

import sympy

from dcompile.ir.expr import Expr, const, index, op, to
from dcompile.ir.nodes import Literal
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import Lowering, loop_index
from dcompile.lower.table import NoRule, rule


def _filled(b: Lowering, value: Any) -> Value:
    out = b.out
    if out.dtype.library_only:
        raise NoRule
    if isinstance(value, Value):
        return b.pointwise(out, b.element(value, out.shape))
    if isinstance(value, sympy.Expr):
        return b.pointwise(out, to(index(value), out.dtype))
    if isinstance(value, bool | int | float):
        return b.pointwise(out, const(value, out.dtype))
    raise NoRule


@rule("full", any_device=True)
def full(b: Lowering, size: Any, value: Any, **_: Any) -> Value:
    return _filled(b, value)


@rule("full_like", any_device=True)
def full_like(b: Lowering, like: Any, value: Any, **_: Any) -> Value:
    return _filled(b, value)


@rule("new_full", any_device=True)
def new_full(b: Lowering, like: Any, size: Any, value: Any, **_: Any) -> Value:
    return _filled(b, value)


@rule("zeros", "zeros_like", "new_zeros", "zero", any_device=True)
def zeros(b: Lowering, *_: Any, **__: Any) -> Value:
    return _filled(b, 0)


@rule("ones", "ones_like", "new_ones", any_device=True)
def ones(b: Lowering, *_: Any, **__: Any) -> Value:
    return _filled(b, 1)


@rule("scalar_tensor")
def scalar_tensor(b: Lowering, value: Any, **_: Any) -> Value:
    return _filled(b, value)


@rule("fill.Scalar", "fill.Tensor")
def fill(b: Lowering, x: Any, value: Any) -> Value:
    return _filled(b, value)


@rule(
    "empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted",
    any_dtype=True, any_device=True,
)  # fmt: skip
def empty(b: Lowering, *_: Any, **__: Any) -> Value:
    """Memory without contents, allocated by the library."""
    out = b.out
    kwargs = (("dtype", Literal("dtype", out.dtype.value)), ("device", Literal("device", out.device)))
    return b.library(out, "aten.empty_strided.default", (out.shape, out.stride), kwargs)


@rule("arange.start_step", "arange.start", "arange")
def arange(b: Lowering, *bounds: Any, **_: Any) -> Value:
    """``start + step * i``: exact for integers, in f64 rounded once for fractions."""
    start = bounds[0] if len(bounds) > 1 else 0
    step = bounds[2] if len(bounds) > 2 else 1
    (i,) = loop_index(b.out.shape)
    if all(isinstance(v, int | sympy.Expr) for v in (start, step)):
        return b.pointwise(b.out, index(start + step * i))
    spaced = op("mul", to(index(i), DType.F64), const(step, DType.F64))
    return b.pointwise(b.out, op("add", const(start, DType.F64), spaced))


@rule("eye", "eye.m")
def eye(b: Lowering, *_: Any, **__: Any) -> Value:
    row, column = loop_index(b.out.shape)
    return b.pointwise(b.out, to(op("eq", index(row), index(column)), b.out.dtype))


def _triangle(b: Lowering, x: Value, lower: bool, diagonal: Any) -> Value:
    row, column = loop_index(x.shape)[-2:]
    inside = op("le" if lower else "ge", index(column), index(row + diagonal))
    body = b.element(x, x.shape)
    return b.pointwise(b.out, op("where", inside, body, const(0, x.dtype)))


@rule("tril")
def tril(b: Lowering, x: Value, diagonal: Any = 0) -> Value:
    return _triangle(b, x, True, diagonal)


@rule("triu")
def triu(b: Lowering, x: Value, diagonal: Any = 0) -> Value:
    return _triangle(b, x, False, diagonal)


def ramp(shape: Any) -> Expr:
    """The row-major position inside ``shape`` as an i64 value."""
    flat: sympy.Expr = sympy.Integer(0)
    for var, size in zip(loop_index(shape), shape, strict=True):
        flat = flat * size + var
    return index(sympy.expand(flat))
