"""Elementwise rules: arithmetic, comparison, logic, selection.

Values of 16-bit floats are computed in f32 and rounded once per ATen op, as eager does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dcompile.ir import expr as ex
from dcompile.ir.expr import Expr, const, op, to
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import Lowering
from dcompile.lower.promotion import common_dtype
from dcompile.lower.table import NoRule, rule

Scalar = Callable[..., Expr]


def elementwise(
    b: Lowering, function: Scalar, *operands: Any, out: Value | None = None, dtype: DType | None = None
) -> Value:
    """``out = function(operands…)`` element by element, computed in ``dtype`` (None: the compute type of ``out``)."""
    out = out or b.out
    dtype = (dtype or out.dtype).compute
    return b.pointwise(out, function(*(b.element(operand, out.shape, dtype) for operand in operands)))


def literal(like: Expr, value: float) -> Expr:
    """``value`` in the dtype of ``like``."""
    return const(value, like.dtype)


# unary ---------------------------------------------------------------------------------------------------------------

_FLOAT_UNARY = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "sigmoid",
)  # fmt: skip
_ANY_UNARY = ("neg", "abs", "sign")
_ROUNDING = ("floor", "ceil", "trunc", "round")


def _register_unary() -> None:
    def make(name: str, rounding: bool) -> Callable[[Lowering, Any], Value]:
        def apply(b: Lowering, x: Any) -> Value:
            if rounding and not b.out.dtype.is_float:
                return elementwise(b, lambda v: v, x)
            return elementwise(b, lambda v: op(name, v), x)

        return apply

    for name in (*_FLOAT_UNARY, *_ANY_UNARY, *_ROUNDING):
        rule(name)(make(name, name in _ROUNDING))


_register_unary()


@rule("positive", "clone", "lift_fresh_copy", "_to_copy")
def copy(b: Lowering, x: Value, **_: Any) -> Value:
    """A copy in the dtype and layout of the result."""
    return b.pointwise(b.out, b.element(x, b.out.shape))


@rule("prims.convert_element_type.default")
def convert_element_type(b: Lowering, x: Value, dtype: Any) -> Value:
    """``x`` in another dtype; the tracer puts it where it keeps a float as a tensor."""
    return b.pointwise(b.out, b.element(x, b.out.shape))


@rule("copy")
def copy_onto(b: Lowering, x: Value, source: Any, non_blocking: bool = False) -> Value:
    """The functional form of ``x.copy_(source)``: ``source`` in the shape and dtype of ``x``."""
    return b.pointwise(b.out, b.element(source, b.out.shape, None if isinstance(source, Value) else b.out.dtype))


@rule("square")
def square(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("mul", v, v), x)


@rule("sgn")
def sgn(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("sign", v), x)


@rule("frac")
def frac(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("sub", v, op("trunc", v)), x)


@rule("deg2rad", "rad2deg")
def angle_unit(b: Lowering, x: Any) -> Value:
    factor = math.pi / 180 if "deg2rad" in str(b.node.target) else 180 / math.pi
    return elementwise(b, lambda v: op("mul", v, literal(v, factor)), x)


@rule("isnan", "isinf", "isfinite")
def classify(b: Lowering, x: Value) -> Value:
    name = str(b.node.target).split(".")[1]
    if not x.dtype.is_float:
        return b.pointwise(b.out, const(name == "isfinite", DType.BOOL))

    def test(v: Expr) -> Expr:
        if name == "isfinite":
            return op("lt", op("abs", v), literal(v, math.inf))
        return op(name, v)

    return elementwise(b, test, x, dtype=x.dtype)


# arithmetic ----------------------------------------------------------------------------------------------------------


def _scaled(v: Expr, alpha: Any) -> Expr:
    return v if alpha == 1 else op("mul", v, literal(v, alpha))


def _number(value: Any) -> Any:
    """A number known now.

    Raises:
        NoRule: it is symbolic or complex.
    """
    if isinstance(value, bool | int | float):
        return value
    raise NoRule


@rule("add.Tensor", "add.Scalar")
def add(b: Lowering, x: Any, y: Any, alpha: Any = 1) -> Value:
    alpha = _number(alpha)
    if b.out.dtype is DType.BOOL:
        if alpha != 1:
            raise NoRule
        return elementwise(b, lambda v, w: op("or", v, w), x, y)
    return elementwise(b, lambda v, w: op("add", v, _scaled(w, alpha)), x, y)


@rule("sub.Tensor", "sub.Scalar")
def sub(b: Lowering, x: Any, y: Any, alpha: Any = 1) -> Value:
    alpha = _number(alpha)
    return elementwise(b, lambda v, w: op("sub", v, _scaled(w, alpha)), x, y)


@rule("rsub.Tensor", "rsub.Scalar")
def rsub(b: Lowering, x: Any, y: Any, alpha: Any = 1) -> Value:
    return sub(b, y, x, alpha=alpha)


@rule("mul.Tensor", "mul.Scalar")
def mul(b: Lowering, x: Any, y: Any) -> Value:
    name = "and" if b.out.dtype is DType.BOOL else "mul"
    return elementwise(b, lambda v, w: op(name, v, w), x, y)


def quotient(v: Expr, w: Expr) -> Expr:
    """``v / w``. Division by a power of two is a multiplication, which gives the same bits."""
    if isinstance(w, ex.Const) and isinstance(w.value, float) and w.value and math.isfinite(w.value):
        mantissa, exponent = math.frexp(w.value)
        if abs(mantissa) == 0.5 and abs(exponent) < 64:
            return op("mul", v, literal(v, 1.0 / w.value))
    return op("div", v, w)


@rule("div.Tensor", "div.Scalar", "true_divide.Tensor")
def div(b: Lowering, x: Any, y: Any) -> Value:
    return elementwise(b, quotient, x, y)


@rule("div.Tensor_mode", "div.Scalar_mode")
def div_mode(b: Lowering, x: Any, y: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return div(b, x, y)
    name = {"floor": "floordiv", "trunc": "truncdiv"}[rounding_mode]
    return elementwise(b, lambda v, w: op(name, v, w), x, y)


@rule("floor_divide", "floor_divide.Scalar")
def floor_divide(b: Lowering, x: Any, y: Any) -> Value:
    return elementwise(b, lambda v, w: op("floordiv", v, w), x, y)


def _operator(name: str) -> tuple[str, str]:
    return f"__{name}__.Tensor", f"__{name}__.Scalar"


_OF_BITS = frozenset({"and", "or", "xor", "shl", "shr"})


def _register_binary() -> None:
    def make(name: str) -> Callable[[Lowering, Any, Any], Value]:
        def apply(b: Lowering, x: Any, y: Any) -> Value:
            if name in _OF_BITS and b.out.dtype.is_float:
                raise NoRule  # the library says why it cannot
            return elementwise(b, lambda v, w: op(name, v, w), x, y)

        return apply

    for name, ops in {
        "mod": ("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor"),
        "fmod": ("fmod.Tensor", "fmod.Scalar"),
        "maximum": ("maximum",),
        "minimum": ("minimum",),
        "fmax": ("fmax",),
        "fmin": ("fmin",),
        "atan2": ("atan2",),
        "and": ("bitwise_and.Tensor", "bitwise_and.Scalar", "bitwise_and.Scalar_Tensor", *_operator("and")),
        "or": ("bitwise_or.Tensor", "bitwise_or.Scalar", "bitwise_or.Scalar_Tensor", *_operator("or")),
        "xor": ("bitwise_xor.Tensor", "bitwise_xor.Scalar", "bitwise_xor.Scalar_Tensor", *_operator("xor")),
        "shl": ("bitwise_left_shift.Tensor", "bitwise_left_shift.Tensor_Scalar", *_operator("lshift")),
        "shr": ("bitwise_right_shift.Tensor", "bitwise_right_shift.Tensor_Scalar", *_operator("rshift")),
    }.items():
        rule(*ops)(make(name))


_register_binary()


@rule("bitwise_not")
def bitwise_not(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("not", v), x)


def power(v: Expr, exponent: float) -> Expr:
    """``v ** exponent``, by multiplication for the exponents eager treats so."""
    float_forms: dict[float, Callable[[], Expr]] = {
        0.5: lambda: op("sqrt", v),
        -0.5: lambda: op("rsqrt", v),
        -1: lambda: op("reciprocal", v),
        -2: lambda: op("reciprocal", op("mul", v, v)),
    }
    if exponent == 0:
        return literal(v, 1)
    if exponent == 1:
        return v
    if exponent == 2:
        return op("mul", v, v)
    if exponent == 3:
        return op("mul", op("mul", v, v), v)
    if v.dtype.is_float and exponent in float_forms:
        return float_forms[exponent]()
    return op("pow", v, literal(v, exponent))


@rule("pow.Tensor_Scalar")
def pow_scalar(b: Lowering, x: Any, exponent: Any) -> Value:
    exponent = _number(exponent)
    if b.out.dtype is DType.BOOL or (b.out.dtype.is_int and isinstance(exponent, int | float) and exponent < 0):
        raise NoRule  # the library refuses integers to negative powers
    return elementwise(b, lambda v: power(v, exponent), x)


@rule("pow.Tensor_Tensor")
def pow_tensor(b: Lowering, x: Any, y: Any) -> Value:
    if b.out.dtype is DType.BOOL:
        raise NoRule
    return elementwise(b, lambda v, w: op("pow", v, w), x, y)


@rule("pow.Scalar")
def pow_of_scalar(b: Lowering, x: Any, y: Any) -> Value:
    if x == 2 and b.out.dtype.is_float:
        return elementwise(b, lambda w: op("exp2", w), y)
    return pow_tensor(b, _number(x), y)


@rule("addcmul")
def addcmul(b: Lowering, x: Any, y: Any, z: Any, value: Any = 1) -> Value:
    value = _number(value)
    return elementwise(b, lambda u, v, w: op("add", u, op("mul", _scaled(v, value), w)), x, y, z)


@rule("addcdiv")
def addcdiv(b: Lowering, x: Any, y: Any, z: Any, value: Any = 1) -> Value:
    value = _number(value)
    return elementwise(b, lambda u, v, w: op("add", u, op("div", _scaled(v, value), w)), x, y, z)


def interpolate(start: Expr, end: Expr, weight: Expr) -> Expr:
    """Linear interpolation, from the nearer end as eager does so that both ends are exact."""
    span = op("sub", end, start)
    near = op("lt", op("abs", weight), literal(weight, 0.5))
    from_start = op("add", start, op("mul", weight, span))
    from_end = op("sub", end, op("mul", span, op("sub", literal(weight, 1.0), weight)))
    if isinstance(weight, ex.Const):
        return from_start if abs(weight.value) < 0.5 else from_end
    return op("where", near, from_start, from_end)


@rule("lerp.Scalar", "lerp.Tensor")
def lerp(b: Lowering, start: Any, end: Any, weight: Any) -> Value:
    return elementwise(b, interpolate, start, end, weight)


# comparison and logic ------------------------------------------------------------------------------------------------


def _rounded(value: Any, dtype: DType) -> Any:
    """A number as a tensor of ``dtype`` would hold it: comparisons are made in the narrow type."""
    if isinstance(value, float) and dtype.is_low_precision:
        return float(torch.tensor(value, dtype=dtype.torch))
    return value


def compare(name: str) -> Callable[[Lowering, Any, Any], Value]:
    """The rule of a comparison."""

    def apply(b: Lowering, x: Any, y: Any) -> Value:
        dtype = common_dtype(x, y)
        return elementwise(b, lambda v, w: op(name, v, w), _rounded(x, dtype), _rounded(y, dtype), dtype=dtype)

    return apply


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    rule(f"{_name}.Tensor", f"{_name}.Scalar")(compare(_name))


def truth(b: Lowering, x: Any, shape: Any) -> Expr:
    """``x != 0``, as bool."""
    return to(b.element(x, shape), DType.BOOL) if isinstance(x, Value) else const(bool(x), DType.BOOL)


@rule("logical_and", "logical_or", "logical_xor")
def logical(b: Lowering, x: Any, y: Any) -> Value:
    name = str(b.node.target).split(".")[1].removeprefix("logical_")
    return b.pointwise(b.out, op(name, truth(b, x, b.out.shape), truth(b, y, b.out.shape)))


@rule("logical_not")
def logical_not(b: Lowering, x: Any) -> Value:
    return b.pointwise(b.out, op("not", truth(b, x, b.out.shape)))


# selection -----------------------------------------------------------------------------------------------------------


@rule("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(b: Lowering, condition: Value, x: Any, y: Any) -> Value:
    shape, dtype = b.out.shape, b.out.dtype
    picked = op("where", truth(b, condition, shape), b.element(x, shape, dtype), b.element(y, shape, dtype))
    return b.pointwise(b.out, picked)


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Lowering, x: Any, mask: Value, value: Any) -> Value:
    return where(b, mask, value, x)


@rule("clamp", "clamp.Tensor", "clip", "hardtanh")
def clamp(b: Lowering, x: Any, low: Any = None, high: Any = None) -> Value:
    if str(b.node.target) == "aten.hardtanh.default":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    operands = [bound for bound in (low, high) if bound is not None]

    def limit(v: Expr, *bounds: Expr) -> Expr:
        rest = list(bounds)
        if low is not None:
            v = op("maximum", v, rest.pop(0))
        return op("minimum", v, rest.pop(0)) if high is not None else v

    return elementwise(b, limit, x, *operands)


@rule("clamp_min", "clamp_min.Tensor")
def clamp_min(b: Lowering, x: Any, low: Any) -> Value:
    return elementwise(b, lambda v, w: op("maximum", v, w), x, low)


@rule("clamp_max", "clamp_max.Tensor")
def clamp_max(b: Lowering, x: Any, high: Any) -> Value:
    return elementwise(b, lambda v, w: op("minimum", v, w), x, high)


@rule("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self")
def xlogy(b: Lowering, x: Any, y: Any) -> Value:
    def formula(v: Expr, w: Expr) -> Expr:
        product = op("mul", v, op("log", w))
        guarded = op("where", op("eq", v, literal(v, 0)), literal(v, 0), product)
        return op("where", op("isnan", w), w, guarded)

    return elementwise(b, formula, x, y)
