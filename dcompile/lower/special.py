"""Special functions: kernels on the CPU, where the printer has them; library calls on other devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dcompile.ir.expr import Expr, const, op
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import Lowering
from dcompile.lower.pointwise import elementwise, literal
from dcompile.lower.table import NoRule, rule

_FUNCTIONS = {
    "i0": ("i0", "special_i0", "special_modified_bessel_i0"),
    "i1": ("special_i1", "special_modified_bessel_i1"),
    "i0e": ("special_i0e",),
    "i1e": ("special_i1e",),
    "k0": ("special_modified_bessel_k0",),
    "k1": ("special_modified_bessel_k1",),
    "k0e": ("special_scaled_modified_bessel_k0",),
    "k1e": ("special_scaled_modified_bessel_k1",),
    "bessel_j0": ("special_bessel_j0",),
    "bessel_j1": ("special_bessel_j1",),
    "bessel_y0": ("special_bessel_y0",),
    "bessel_y1": ("special_bessel_y1",),
    "spherical_j0": ("special_spherical_bessel_j0",),
    "airy_ai": ("special_airy_ai",),
    "erfcx": ("special_erfcx",),
    "ndtri": ("special_ndtri",),
    "erfinv": ("erfinv",),
    "digamma": ("digamma",),
    "hypot": ("hypot",),
    "igamma": ("igamma",),
    "igammac": ("igammac",),
    "zeta": ("special_zeta", "special_zeta.other_scalar", "special_zeta.self_scalar"),
}
_POLYNOMIALS = {
    "chebyshev_t": "chebyshev_polynomial_t",
    "chebyshev_u": "chebyshev_polynomial_u",
    "chebyshev_v": "chebyshev_polynomial_v",
    "chebyshev_w": "chebyshev_polynomial_w",
    "shifted_t": "shifted_chebyshev_polynomial_t",
    "shifted_u": "shifted_chebyshev_polynomial_u",
    "shifted_v": "shifted_chebyshev_polynomial_v",
    "shifted_w": "shifted_chebyshev_polynomial_w",
    "hermite_h": "hermite_polynomial_h",
    "hermite_he": "hermite_polynomial_he",
    "laguerre": "laguerre_polynomial_l",
    "legendre": "legendre_polynomial_p",
}


def on_cpu(b: Lowering) -> None:
    """
    Raises:
        NoRule: the result lives elsewhere, where the printer has no special functions.
    """
    if b.out_at(0).device != "cpu":
        raise NoRule


def _register() -> None:
    def make(name: str) -> Callable[..., Value]:
        def apply(b: Lowering, *operands: Any) -> Value:
            on_cpu(b)
            return elementwise(b, lambda *values: op(f"special_{name}", *values), *operands)

        return apply

    for name, ops in _FUNCTIONS.items():
        rule(*ops)(make(name))
    for name, full in _POLYNOMIALS.items():
        rule(f"special_{full}", f"special_{full}.n_scalar", f"special_{full}.x_scalar")(make(name))


_register()


@rule("polygamma")
def polygamma(b: Lowering, order: Any, x: Value) -> Value:
    on_cpu(b)
    return elementwise(b, lambda v: op("special_polygamma", literal(v, order), v), x)


@rule("nextafter")
def nextafter(b: Lowering, x: Any, y: Any) -> Value:
    on_cpu(b)
    if b.out.dtype.is_low_precision:
        raise NoRule
    return elementwise(b, lambda v, w: op("special_nextafter", v, w), x, y)


@rule("frexp.Tensor")
def frexp(b: Lowering, x: Value) -> tuple[Value, Value]:
    on_cpu(b)
    elementwise(b, lambda v: op("special_mantissa", v), x, out=b.out_at(0))
    wide = x.dtype.compute
    exponent = op("special_exponent", b.element(x, b.out_at(1).shape, wide))
    return b.out_at(0), b.pointwise(b.out_at(1), exponent)


# the sign bit --------------------------------------------------------------------------------------------------------

_BITS = {DType.F32: DType.I32, DType.F64: DType.I64}


def _bits(v: Expr) -> Expr:
    return op("bitcast", v, dtype=_BITS[v.dtype])


def _with_sign(magnitude: Expr, sign: Expr) -> Expr:
    bits = _BITS[magnitude.dtype]
    top = const(-(2 ** (8 * bits.itemsize - 1)), bits)
    rest = const(2 ** (8 * bits.itemsize - 1) - 1, bits)
    joined = op("or", op("and", _bits(magnitude), rest), op("and", _bits(sign), top))
    return op("bitcast", joined, dtype=magnitude.dtype)


@rule("copysign.Tensor", "copysign.Scalar")
def copysign(b: Lowering, x: Any, y: Any) -> Value:
    return elementwise(b, _with_sign, x, y)


@rule("signbit")
def signbit(b: Lowering, x: Value) -> Value:
    dtype = x.dtype.compute

    def negative(v: Expr) -> Expr:
        bits = _bits(v) if v.dtype.is_float else v
        return op("lt", bits, const(0, bits.dtype))

    if x.dtype is DType.BOOL:
        return b.pointwise(b.out, const(False, DType.BOOL))
    return b.pointwise(b.out, negative(b.element(x, b.out.shape, dtype)))


@rule("angle")
def angle(b: Lowering, x: Value) -> Value:
    """0, or pi for negative numbers; complex numbers have no rule."""

    def direction(v: Expr) -> Expr:
        return op(
            "where", op("isnan", v), v, op("where", op("lt", v, literal(v, 0)), literal(v, math.pi), literal(v, 0))
        )

    return elementwise(b, direction, x)


@rule("round.decimals")
def round_to(b: Lowering, x: Value, decimals: Any = 0) -> Value:
    if not b.out.dtype.is_float:
        raise NoRule

    def rounded(v: Expr) -> Expr:
        scale = literal(v, 10.0 ** abs(decimals))
        if decimals == 0:
            return op("round", v)
        if decimals > 0:
            return op("div", op("round", op("mul", v, scale)), scale)
        return op("mul", op("round", op("div", v, scale)), scale)

    return elementwise(b, rounded, x)
