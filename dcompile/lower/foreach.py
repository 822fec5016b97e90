"""List ops: the rule of the elementwise op, once per element of the lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcompile.ir.expr import Expr, op
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.pointwise import elementwise, interpolate, literal, power, quotient
from dcompile.lower.table import NoRule, rule

Scalar = Callable[..., Expr]


def _each(b: Lowering, function: Scalar, *operands: Any) -> tuple[Value, ...]:
    """``function`` over the lists; an operand that is no list is shared by all elements."""
    found = []
    for n in range(len(b.outs)):
        out = b.out_at(n)
        if not out.dtype.is_float:
            raise NoRule  # promotion of integers and bools is left to the library
        here = [operand[n] if isinstance(operand, tuple) else operand for operand in operands]
        found.append(elementwise(b, function, *here, out=out))
    return tuple(found)


def _name(b: Lowering) -> str:
    return str(b.node.target).split(".")[1].removeprefix("_foreach_")


def _overloads(name: str, *overloads: str) -> tuple[str, ...]:
    return tuple(f"_foreach_{name}.{overload}" for overload in overloads)


_LIST_AND_SCALAR = ("List", "Scalar", "ScalarList")


@rule(*_overloads("add", "List", "Scalar", "ScalarList", "Tensor"), *_overloads("sub", *_LIST_AND_SCALAR))
def add(b: Lowering, x: Any, y: Any, alpha: Any = 1) -> tuple[Value, ...]:
    name = _name(b)

    def formula(v: Expr, w: Expr) -> Expr:
        return op(name, v, w if alpha == 1 else op("mul", w, literal(w, alpha)))

    return _each(b, formula, x, y)


@rule(*_overloads("mul", "List", "Scalar", "ScalarList", "Tensor"))
def mul(b: Lowering, x: Any, y: Any) -> tuple[Value, ...]:
    return _each(b, lambda v, w: op("mul", v, w), x, y)


@rule(*_overloads("div", "List", "Scalar", "ScalarList", "Tensor"))
def div(b: Lowering, x: Any, y: Any) -> tuple[Value, ...]:
    return _each(b, quotient, x, y)


@rule(
    *_overloads("maximum", *_LIST_AND_SCALAR), *_overloads("minimum", *_LIST_AND_SCALAR),
    *_overloads("clamp_min", *_LIST_AND_SCALAR), *_overloads("clamp_max", *_LIST_AND_SCALAR),
)  # fmt: skip
def bound(b: Lowering, x: Any, y: Any) -> tuple[Value, ...]:
    name = {"clamp_min": "maximum", "clamp_max": "minimum"}.get(_name(b), _name(b))
    return _each(b, lambda v, w: op(name, v, w), x, y)


@rule(*_overloads("addcmul", "Scalar", "ScalarList"), *_overloads("addcdiv", "Scalar", "ScalarList"))
def addcmul(b: Lowering, x: Any, y: Any, z: Any, value: Any = 1) -> tuple[Value, ...]:
    name = "mul" if _name(b) == "addcmul" else "div"

    def formula(u: Expr, v: Expr, w: Expr, s: Expr) -> Expr:
        return op("add", u, op(name, op("mul", s, v), w))

    return _each(b, formula, x, y, z, value)


@rule(*_overloads("lerp", "List", "Scalar", "ScalarList"))
def lerp(b: Lowering, start: Any, end: Any, weight: Any) -> tuple[Value, ...]:
    return _each(b, interpolate, start, end, weight)


@rule(*_overloads("pow", "Scalar", "ScalarList", "List"))
def pow_(b: Lowering, x: Any, exponent: Any) -> tuple[Value, ...]:
    if isinstance(exponent, int | float):
        return _each(b, lambda v: power(v, exponent), x)
    return _each(b, lambda v, w: op("pow", v, w), x, exponent)


@rule("_foreach_pow.ScalarAndTensor")
def pow_of_scalar(b: Lowering, base: Any, exponent: Any) -> tuple[Value, ...]:
    return _each(b, lambda v, w: op("pow", v, w), base, exponent)


_UNARY = (
    "abs", "neg", "sqrt", "rsqrt", "reciprocal", "exp", "expm1", "log", "log2", "log10", "log1p", "sin", "cos",
    "tan", "tanh", "sigmoid", "erf", "erfc", "floor", "ceil", "round", "trunc", "sign",
)  # fmt: skip


@rule(*(f"_foreach_{name}" for name in _UNARY))
def unary(b: Lowering, x: Any) -> tuple[Value, ...]:
    name = _name(b)
    return _each(b, lambda v: op(name, v), x)


@rule("_foreach_zero")
def zero(b: Lowering, x: Any) -> tuple[Value, ...]:
    return _each(b, lambda v: literal(v, 0), x)


@rule("_foreach_copy")
def copy(b: Lowering, x: Any, source: Any, non_blocking: bool = False) -> tuple[Value, ...]:
    return _each(b, lambda v: v, source)
