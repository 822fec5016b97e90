"""Every row of ``ir.ops.OPS`` as a function of torch tensors, with eager semantics in the operands' dtype.

Random numbers (the definition every code generator implements): Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the counter ``(number low, number high, 0, 0)`` under the key
``(seed low, seed high)``, low and high being the 32-bit halves of i64. With output words ``w0 .. w3``:

    rand  = (w >> 8) * 2**-24                                     in f32, uniform in [0, 1)
            16 counters serve 64 neighbouring offsets, the first 16 with w0, the next with w1, and so on:
            number = offset // 64 * 16 + offset % 16, w = words[offset // 16 % 4]
    randn = sqrt(-2 * log(u1)) * cos(2 * pi * u2)                 in f32, Box-Muller
            number = offset, u1 = ((w0 >> 8) + 1) * 2**-24, u2 = (w1 >> 8) * 2**-24
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from dcompile.ir.ops import OPS, Result
from dcompile.ir.types import DType

_WORD = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_UNIT = 2.0**-24


def philox(seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox 4x32-10, as i64 tensors of values below 2**32.

    Args:
        seed, offset: i64, broadcast against each other; key and low half of the counter.
    """
    zero = torch.zeros_like(seed + offset)
    seed, offset = seed + zero, offset + zero
    return _philox_rounds((offset & _WORD, (offset >> 32) & _WORD, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))


def _philox_rounds(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]  # the 64 product bits are right although i64 wraps
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEP[0]) & _WORD, (k1 + _KEY_STEP[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """``rand`` of the module's definition: f32 in [0, 1)."""
    offset = offset + torch.zeros_like(seed)
    words = torch.stack(philox(seed, (offset >> 6 << 4) | (offset & 15)))
    word = words.gather(0, ((offset >> 4) & 3).unsqueeze(0))[0]
    return (word >> 8).to(torch.float32) * _UNIT


def normal(seed: Tensor, offset: Tensor) -> Tensor:
    """``randn`` of the module's definition: f32, standard normal."""
    w0, w1, _, _ = philox(seed, offset)
    u1 = ((w0 >> 8) + 1).to(torch.float32) * _UNIT
    u2 = (w1 >> 8).to(torch.float32) * _UNIT
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * math.pi * u2)


def _floordiv(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, _checked_divisor(b), rounding_mode="floor")


def _truncdiv(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, _checked_divisor(b), rounding_mode="trunc")


def _remainder(a: Tensor, b: Tensor) -> Tensor:
    return torch.remainder(a, _checked_divisor(b))


def _fmod(a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, _checked_divisor(b))


def _checked_divisor(b: Tensor) -> Tensor:
    if not b.is_floating_point() and bool((b == 0).any()):
        raise ZeroDivisionError("integer division by zero")
    return b


def _wrap_index(position: Tensor, size: Tensor) -> Tensor:
    if bool(((position < -size) | (position >= size)).any()):
        raise IndexError(f"index {_worst(position, size)} is out of range")
    return torch.where(position < 0, position + size, position)


def _worst(position: Tensor, size: Tensor) -> str:
    position, size = position + torch.zeros_like(size), size + torch.zeros_like(position)
    wrong = (position < -size) | (position >= size)
    return f"{int(position[wrong][0])} for size {int(size[wrong][0])}"


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide, "floordiv": _floordiv,
    "truncdiv": _truncdiv, "mod": _remainder, "fmod": _fmod, "pow": torch.pow, "neg": torch.neg, "abs": torch.abs,
    "sign": torch.sign, "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "reciprocal": torch.reciprocal, "fma": lambda a, b, c: a * b + c, "exp": torch.exp, "exp2": torch.exp2,
    "expm1": torch.expm1, "log": torch.log, "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "asin": torch.asin,
    "acos": torch.acos, "atan": torch.atan, "atan2": torch.atan2, "sinh": torch.sinh, "cosh": torch.cosh,
    "tanh": torch.tanh, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh, "erf": torch.erf,
    "erfc": torch.erfc, "lgamma": torch.lgamma, "sigmoid": torch.sigmoid, "floor": torch.floor, "ceil": torch.ceil,
    "trunc": torch.trunc, "round": torch.round, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge, "isnan": torch.isnan, "isinf": torch.isinf, "and": torch.bitwise_and,
    "or": torch.bitwise_or, "xor": torch.bitwise_xor, "not": torch.bitwise_not, "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift, "where": torch.where, "wrap_index": _wrap_index, "rand": uniform, "randn": normal,
}  # fmt: skip
"""The torch function of each op; ``to`` and ``bitcast``, which need their result dtype, are in ``apply``."""

_SPECIAL = {
    "i0": torch.special.i0, "i1": torch.special.i1, "i0e": torch.special.i0e, "i1e": torch.special.i1e,
    "k0": torch.special.modified_bessel_k0, "k1": torch.special.modified_bessel_k1,
    "k0e": torch.special.scaled_modified_bessel_k0, "k1e": torch.special.scaled_modified_bessel_k1,
    "bessel_j0": torch.special.bessel_j0, "bessel_j1": torch.special.bessel_j1,
    "bessel_y0": torch.special.bessel_y0, "bessel_y1": torch.special.bessel_y1,
    "spherical_j0": torch.special.spherical_bessel_j0, "airy_ai": torch.special.airy_ai,
    "erfcx": torch.special.erfcx, "ndtri": torch.special.ndtri, "erfinv": torch.special.erfinv,
    "digamma": torch.special.digamma, "igamma": torch.igamma, "igammac": torch.igammac,
    "zeta": torch.special.zeta, "hypot": torch.hypot, "nextafter": torch.nextafter,
    "mantissa": lambda x: torch.frexp(x)[0], "exponent": lambda x: torch.frexp(x)[1].to(x.dtype),
    "polygamma": lambda n, x: torch.special.polygamma(int(n.flatten()[0]), x),
    "chebyshev_t": torch.special.chebyshev_polynomial_t, "chebyshev_u": torch.special.chebyshev_polynomial_u,
    "chebyshev_v": torch.special.chebyshev_polynomial_v, "chebyshev_w": torch.special.chebyshev_polynomial_w,
    "shifted_t": torch.special.shifted_chebyshev_polynomial_t,
    "shifted_u": torch.special.shifted_chebyshev_polynomial_u,
    "shifted_v": torch.special.shifted_chebyshev_polynomial_v,
    "shifted_w": torch.special.shifted_chebyshev_polynomial_w,
    "hermite_h": torch.special.hermite_polynomial_h, "hermite_he": torch.special.hermite_polynomial_he,
    "laguerre": torch.special.laguerre_polynomial_l, "legendre": torch.special.legendre_polynomial_p,
}  # fmt: skip
FUNCTIONS.update({f"special_{name}": function for name, function in _SPECIAL.items()})

DIVISIONS = frozenset({"floordiv", "truncdiv", "mod", "fmod"})


def apply(name: str, args: list[Tensor], dtype: DType) -> Tensor:
    """One op over whole tensors, broadcast against each other.

    16-bit floats are computed in f32 and rounded once an op, as eager does on every device.

    Raises:
        ZeroDivisionError: an integer division by zero.
        IndexError: ``wrap_index`` out of range.
    """
    if name == "to":
        return args[0].to(dtype.torch)
    if name == "bitcast":
        return args[0].view(dtype.torch)
    if any(a.dtype in (torch.float16, torch.bfloat16) for a in args):
        wide = [a.float() if a.dtype in (torch.float16, torch.bfloat16) else a for a in args]
        found = FUNCTIONS[name](*wide)
        return found if OPS[name].result is Result.BOOL else found.to(dtype.torch)
    return FUNCTIONS[name](*args)


def fold(kind: str, values: Tensor) -> Tensor:
    """``ops.REDUCTIONS`` over dimension 0, accumulated in the values' dtype; of no values the neutral element."""
    if kind == "sum":
        return values.sum(0, dtype=values.dtype)
    if kind == "prod":
        return values.prod(0, dtype=values.dtype)
    if kind == "any":
        return values.any(0)
    if kind == "xor":
        found = torch.zeros(values.shape[1:], dtype=values.dtype)
        return reduce(torch.bitwise_xor, values, found)
    highest = kind in ("max", "argmax")
    if kind in ("max", "min"):
        if values.shape[0] == 0:
            return torch.full(values.shape[1:], _extreme(values.dtype, not highest), dtype=values.dtype)
        return values.amax(0) if highest else values.amin(0)
    if values.shape[0] == 0:
        return torch.zeros(values.shape[1:], dtype=torch.int64)
    best = values == (values.amax(0) if highest else values.amin(0))
    best |= values != values  # amax and amin are NaN where any value is, and NaN equals nothing
    position = torch.arange(values.shape[0]).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(best, position, values.shape[0]).amin(0)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over dimension 0, in double precision, rounded once to the compute type."""
    found = (a.double() * b.double()).sum(0)
    return found if a.dtype is torch.float64 else found.float()


def welford(means: Tensor, squares: Tensor | None = None, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Mean, sum of squared distances from it and weight over dimension 0, in double precision, rounded once.

    The squared distances are NaN if an element is infinite; the mean is then infinite or NaN.

    Args:
        means: elements, or the means of parts.
        squares, weights: the other two of each part; None: each part is one element.
    """
    dtype = means.dtype
    n = torch.ones_like(means, dtype=torch.float64) if weights is None else weights.double()
    inside = torch.zeros_like(n) if squares is None else squares.double()
    present = torch.where(n == 0, 0.0, means.double())
    total = n.sum(0)
    mean = torch.where(total == 0, 0.0, (present * n).sum(0) / total)
    apart = present - mean
    spread = (torch.where(n == 0, 0.0, inside + n * apart * apart)).sum(0)
    return mean.to(dtype), spread.to(dtype), total.to(dtype)


def _extreme(dtype: torch.dtype, highest: bool) -> float | int | bool:
    if dtype.is_floating_point:
        return math.inf if highest else -math.inf
    if dtype is torch.bool:
        return highest
    return torch.iinfo(dtype).max if highest else torch.iinfo(dtype).min
