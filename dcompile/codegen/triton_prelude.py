"""Helper functions every generated Triton module starts with."""

PRELUDE = '''\
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def index_div(a, b):
    """a // b rounded down."""
    q = a // b
    return q - ((a - q * b != 0) & ((a < 0) != (b < 0))).to(q.dtype)


@triton.jit
def index_mod(a, b):
    """a - b * index_div(a, b)."""
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def int_divisor(a, b):
    """The divisor of an integer division; 0, which the kernel reports, becomes 1."""
    return tl.where(b == 0, (b * 0 + 1).to(b.dtype), b)


@triton.jit
def int_floordiv(a, b):
    d = int_divisor(a, b)
    q = a // d
    return tl.where((a % d != 0) & ((a < 0) != (d < 0)), (q - 1).to(q.dtype), q)


@triton.jit
def int_truncdiv(a, b):
    return a // int_divisor(a, b)


@triton.jit
def int_fmod(a, b):
    return a % int_divisor(a, b)


@triton.jit
def int_mod(a, b):
    d = int_divisor(a, b)
    r = a % d
    return tl.where((r != 0) & ((r < 0) != (d < 0)), (r + d).to(r.dtype), r)


@triton.jit
def int_pow(a, b):
    """By repeated squaring; negative exponents give 0, but for bases 1 and -1."""
    result = (a * 0 + 1).to(a.dtype)
    factor = a
    left = tl.where(b < 0, (b * 0).to(b.dtype), b)
    for _ in range(63):
        result = tl.where(left % 2 != 0, (result * factor).to(a.dtype), result)
        factor = (factor * factor).to(a.dtype)
        left = (left // 2).to(b.dtype)
    odd = (b % 2) != 0
    small = tl.where(a == 1, (a * 0 + 1).to(a.dtype), (a * 0).to(a.dtype))
    small = tl.where(a == -1, tl.where(odd, a, (a * 0 + 1).to(a.dtype)), small)
    return tl.where(b < 0, small, result)


@triton.jit
def int_shl(a, b, BITS: tl.constexpr):
    out = (b < 0) | (b >= BITS)
    zero = (a * 0).to(a.dtype)
    return tl.where(out, zero, a << tl.where(out, (b * 0).to(b.dtype), b))


@triton.jit
def int_shr(a, b, MOST: tl.constexpr):
    out = (b < 0) | (b >= MOST)
    return a >> tl.where(out, (b * 0 + MOST).to(b.dtype), b)


@triton.jit
def float_mod(a, b):
    """Remainder with the sign of b."""
    r = libdevice.fmod(a, b)
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def float_floordiv(a, b, quotient):
    """Largest whole number not above a / b, in exact arithmetic; quotient is a / b rounded."""
    r = libdevice.fmod(a, b)
    q = (a - r) / b
    q = tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1.0, q)
    down = libdevice.floor(q)
    whole = tl.where(q - down > 0.5, down + 1.0, down)
    signed = libdevice.copysign(q * 0.0, quotient)
    return tl.where(b == 0, quotient, tl.where(q == 0, signed, whole))


@triton.jit
def nan_max(a, b):
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def nan_min(a, b):
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def num_max(a, b):
    return tl.where((a >= b) | (b != b), a, b)


@triton.jit
def num_min(a, b):
    return tl.where((a <= b) | (b != b), a, b)


@triton.jit
def fold_sum(a, b):
    return (a + b).to(a.dtype)


@triton.jit
def fold_prod(a, b):
    return (a * b).to(a.dtype)


@triton.jit
def fold_any(a, b):
    return a | b


@triton.jit
def fold_argmax(a, i, b, j):
    """The better of two (value, position) pairs: NaN first, then the larger value, then the smaller position."""
    tie = (a == b) | ((a != a) & (b != b))
    first = tl.where(tie, i < j, (a > b) | (a != a))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def fold_argmin(a, i, b, j):
    tie = (a == b) | ((a != a) & (b != b))
    first = tl.where(tie, i < j, (a < b) | (a != a))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def last_of_rows(x, COUNT: tl.constexpr):
    """The last column of a block of COUNT, every bit of it."""
    kept = tl.arange(0, COUNT)[None, :] == COUNT - 1
    if x.dtype == tl.float32:
        bits = tl.where(kept, x.to(tl.int32, bitcast=True), 0)
        return tl.sum(bits, 1, keep_dims=True).to(tl.int32).to(tl.float32, bitcast=True)
    if x.dtype == tl.float64:
        bits = tl.where(kept, x.to(tl.int64, bitcast=True), 0)
        return tl.sum(bits, 1, keep_dims=True).to(tl.float64, bitcast=True)
    return tl.sum(tl.where(kept, x, 0), 1, keep_dims=True).to(x.dtype)


@triton.jit
def row_divisor(b):
    """What dividing many numbers by b takes: a power of two, b times it, and the finite reciprocal of that."""
    scale = tl.where(tl.abs(b) < 7.888609052210118e-31, 1.152921504606847e18, 1.0)
    scaled = b * scale
    return scale, scaled, tl.div_rn(1.0, scaled)


@triton.jit
def divide_by_row(a, scale, scaled, reciprocal):
    """a / b rounded to nearest: a product corrected by its own error, which is exact."""
    a = a * scale
    q = a * reciprocal
    error = tl.fma(-q, scaled, a)
    return tl.where(tl.abs(error) < float("inf"), tl.fma(error, reciprocal, q), q)


@triton.jit
def philox(seed, number):
    """The words of Philox 4x32-10 for counter (number, 0) under key seed, both split in 32-bit halves."""
    zero = (number * 0).to(tl.uint32)
    return tl.philox(seed, number.to(tl.uint32), (number >> 32).to(tl.uint32), zero, zero)


@triton.jit
def rand(seed, offset):
    """16 counters give 64 neighbours: the 16 first words, then the second ones."""
    w0, w1, w2, w3 = philox(seed, ((offset >> 6) << 4) | (offset & 15))
    odd = (offset & 16) != 0
    word = tl.where((offset & 32) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def randn(seed, offset):
    w0, w1, w2, w3 = philox(seed, offset)
    u1 = ((w0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    u2 = (w1 >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.sqrt_rn(-2.0 * libdevice.log(u1)) * libdevice.cos(6.283185307179586 * u2)
'''
"""Floats follow eager PyTorch: NaN wins in nan_max, loses in num_max; 5.96e-08 is 2**-24. divide_by_row is Markstein's
("Computation of elementary functions on the IBM RISC System/6000 processor", 1990): 2**-100 and 2**60 keep it in range.
"""
