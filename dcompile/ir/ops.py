"""The closed table of scalar operations. Printers, the reference interpreter and the cost model all key on it.

All operands of an op have the same dtype unless its row says otherwise. The result has the operands' dtype, or bool for
predicates. Integer overflow wraps. NaN and infinities follow eager PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Result(Enum):
    """How the result's dtype follows from the operands'."""

    SAME = "same"
    """The dtype of the last operand."""
    BOOL = "bool"
    GIVEN = "given"
    """Stated at construction (casts, random numbers)."""


@dataclass(frozen=True)
class OpInfo:
    """One row: operand count, result type rule, and rough cost in flops of one element on a vector unit."""

    arity: int
    result: Result = Result.SAME
    flops: int = 1


_HEAVY = 12  # polynomial transcendental: about a dozen fused multiply-adds per element
_VERY_HEAVY = 30

SPECIAL_UNARY = tuple(
    f"special_{name}"
    for name in (
        "i0", "i1", "i0e", "i1e", "k0", "k1", "k0e", "k1e", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1",
        "spherical_j0", "airy_ai", "erfcx", "ndtri", "erfinv", "digamma", "mantissa", "exponent",
    )
)  # fmt: skip
SPECIAL_BINARY = tuple(
    f"special_{name}"
    for name in (
        "zeta", "polygamma", "chebyshev_t", "chebyshev_u", "chebyshev_v", "chebyshev_w", "shifted_t", "shifted_u",
        "shifted_v", "shifted_w", "hermite_h", "hermite_he", "laguerre", "legendre", "hypot", "nextafter", "igamma",
        "igammac",
    )
)  # fmt: skip
"""Functions of floats; ``polygamma`` takes its order first, the polynomials last, both as whole floats."""

OPS: dict[str, OpInfo] = {
    # arithmetic
    "add": OpInfo(2),
    "sub": OpInfo(2),
    "mul": OpInfo(2),
    "div": OpInfo(2, flops=4),  # true division, floats only
    "floordiv": OpInfo(2, flops=6),  # rounds to minus infinity; integer division by zero is reported
    "truncdiv": OpInfo(2, flops=6),  # rounds to zero
    "mod": OpInfo(2, flops=8),  # sign of the divisor, torch.remainder
    "fmod": OpInfo(2, flops=8),  # sign of the dividend, torch.fmod
    "pow": OpInfo(2, flops=_VERY_HEAVY),
    "neg": OpInfo(1),
    "abs": OpInfo(1),
    "sign": OpInfo(1),
    "maximum": OpInfo(2),  # NaN if either operand is NaN
    "minimum": OpInfo(2),
    "fmax": OpInfo(2),  # the other operand if one is NaN
    "fmin": OpInfo(2),
    "reciprocal": OpInfo(1, flops=4),
    "fma": OpInfo(3),  # a * b + c, rounded once or twice
    # transcendental
    "exp": OpInfo(1, flops=_HEAVY),
    "exp2": OpInfo(1, flops=_HEAVY),
    "expm1": OpInfo(1, flops=_HEAVY),
    "log": OpInfo(1, flops=_HEAVY),
    "log2": OpInfo(1, flops=_HEAVY),
    "log10": OpInfo(1, flops=_HEAVY),
    "log1p": OpInfo(1, flops=_HEAVY),
    "sqrt": OpInfo(1, flops=4),
    "rsqrt": OpInfo(1, flops=5),
    "sin": OpInfo(1, flops=_HEAVY),
    "cos": OpInfo(1, flops=_HEAVY),
    "tan": OpInfo(1, flops=_VERY_HEAVY),
    "asin": OpInfo(1, flops=_VERY_HEAVY),
    "acos": OpInfo(1, flops=_VERY_HEAVY),
    "atan": OpInfo(1, flops=_VERY_HEAVY),
    "atan2": OpInfo(2, flops=_VERY_HEAVY),
    "sinh": OpInfo(1, flops=_VERY_HEAVY),
    "cosh": OpInfo(1, flops=_VERY_HEAVY),
    "tanh": OpInfo(1, flops=_HEAVY),
    "asinh": OpInfo(1, flops=_VERY_HEAVY),
    "acosh": OpInfo(1, flops=_VERY_HEAVY),
    "atanh": OpInfo(1, flops=_VERY_HEAVY),
    "erf": OpInfo(1, flops=_HEAVY),
    "erfc": OpInfo(1, flops=_VERY_HEAVY),
    "lgamma": OpInfo(1, flops=_VERY_HEAVY),
    "sigmoid": OpInfo(1, flops=_HEAVY),
    # rounding
    "floor": OpInfo(1),
    "ceil": OpInfo(1),
    "trunc": OpInfo(1),
    "round": OpInfo(1),  # half to even
    # predicates
    "eq": OpInfo(2, Result.BOOL),
    "ne": OpInfo(2, Result.BOOL),
    "lt": OpInfo(2, Result.BOOL),
    "le": OpInfo(2, Result.BOOL),
    "gt": OpInfo(2, Result.BOOL),
    "ge": OpInfo(2, Result.BOOL),
    "isnan": OpInfo(1, Result.BOOL),
    "isinf": OpInfo(1, Result.BOOL),
    # bits and logic (bool or integer)
    "and": OpInfo(2),
    "or": OpInfo(2),
    "xor": OpInfo(2),
    "not": OpInfo(1),  # logical on bool, bitwise on integers
    "shl": OpInfo(2),
    "shr": OpInfo(2),  # arithmetic
    # selection: where(bool, a, b)
    "where": OpInfo(3),
    # conversion: to(x) as C converts, except float -> bool is x != 0; bitcast keeps the bits
    "to": OpInfo(1, Result.GIVEN),
    "bitcast": OpInfo(1, Result.GIVEN),
    # counter-based random numbers: (i64 seed, i64 offset) -> f32, Philox 4x32 with 10 rounds (Salmon et al., SC 2011)
    "rand": OpInfo(2, Result.GIVEN, flops=_VERY_HEAVY),  # uniform in [0, 1)
    "randn": OpInfo(2, Result.GIVEN, flops=2 * _VERY_HEAVY),  # standard normal
    # special functions: only the C++ printer knows them
    **{name: OpInfo(1, flops=_VERY_HEAVY) for name in SPECIAL_UNARY},
    **{name: OpInfo(2, flops=_VERY_HEAVY) for name in SPECIAL_BINARY},
    # data-dependent position: (i64 position, i64 size) -> i64; negative wraps once, out of range is reported
    "wrap_index": OpInfo(2, flops=3),
}

REDUCTIONS = frozenset({"sum", "prod", "max", "min", "any", "xor", "argmax", "argmin", "welford", "welford_merge"})
"""Combine rules of ``Reduction``. ``max``/``min`` propagate NaN; ``arg*`` give the row-major position of the first best
element as i64, NaN counting as better than any number; ``any`` is logical or on bool, ``xor`` bitwise on integers and
bool. ``welford`` has three results, the mean, the sum M2 of squared distances from it, and the number of elements;
``welford_merge`` takes such triples and gives the triple of their union (see ``ir.combine``)."""

PRODUCTS = frozenset({"dot", "dot_tf32"})
"""Folds of two operands of one float dtype, in kernels only: the sum of their products, exact or of operands rounded to
tf32, accumulated in the compute type."""

WELFORD = frozenset({"welford", "welford_merge"})
"""Reductions with three results."""

ARG_REDUCTIONS = frozenset({"argmax", "argmin"})

STORE_MODES = frozenset({"set", "add"})
