import math

import pytest
import torch

from tests.unit.lower.harness import check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
aten = torch.ops.aten


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


UNARY = (
    "exp", "exp2", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "asinh", "erf", "erfc", "sigmoid",
    "neg", "abs", "sign", "floor", "ceil", "trunc", "round", "positive", "square", "sgn", "frac", "deg2rad",
    "rad2deg", "reciprocal", "isnan", "isinf", "isfinite", "logical_not", "relu",
)  # fmt: skip
POSITIVE = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh", "lgamma")
UNIT = ("asin", "acos", "atanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNARY + POSITIVE + UNIT)
def test_unary(name: str, dtype: torch.dtype) -> None:
    x = randn(5, 7, dtype=dtype)
    x = x.abs() + 1.1 if name in POSITIVE else x.tanh() * 0.9 if name in UNIT else x
    check(getattr(torch, name), x)


@pytest.mark.parametrize("name", ["exp", "sqrt", "sigmoid", "abs", "neg", "floor", "isnan", "isfinite", "relu", "sign"])
def test_unary_of_integers_promotes_as_eager(name: str) -> None:
    check(getattr(torch, name), torch.tensor([[3, -1, 0], [7, 2, -9]]))


def test_unary_propagates_nan_and_infinities() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5])
    check(
        lambda v: (torch.relu(v), torch.sign(v), torch.isnan(v), torch.isinf(v), torch.isfinite(v), v.clamp(-1, 1)), x
    )


BINARY = (
    "add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "remainder", "fmod", "pow", "atan2",
    "floor_divide", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary_broadcasts(name: str, dtype: torch.dtype) -> None:
    x, y = randn(4, 1, 6, dtype=dtype).abs() + 0.5, randn(3, 6, dtype=dtype, seed=1)
    check(getattr(torch, name), x, y)


@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "maximum", "remainder", "floor_divide", "eq", "lt", "pow", "div"]
)
def test_binary_on_integers(name: str) -> None:
    x, y = torch.tensor([[5, -7, 9, 2]]), torch.tensor([[3], [2], [4]])
    check(getattr(torch, name), x, y)


@pytest.mark.parametrize("mode", [None, "floor", "trunc"])
@pytest.mark.parametrize("integer", [False, True])
def test_division_modes(mode: str | None, integer: bool) -> None:
    x, y = randn(4, 5) * 10, randn(5, seed=1) * 3 + 5
    if integer:
        x, y = x.long(), y.long()
    check(lambda a, b: (torch.div(a, b, rounding_mode=mode), torch.div(a, 3, rounding_mode=mode)), x, y)


def test_promotion_of_mixed_operands() -> None:
    i, f, h, z = torch.tensor([1, 2, 3]), randn(3), randn(3, dtype=torch.bfloat16), torch.tensor(2.5)
    check(
        lambda i, f, h, z: (i + f, i * h, h + f, i + z, h * z, i < f, h > z, i / 2, i + True, 3 - i, 2.5 - h, i == 2.0),
        i, f, h, z,
    )  # fmt: skip


def test_comparison_with_a_number_is_made_in_the_narrow_type() -> None:
    x = torch.tensor([0.1, 0.2], dtype=torch.bfloat16)
    check(lambda v: (v < 0.1, v == 0.1, v >= 0.2), x)


def test_bool_arithmetic() -> None:
    x, y = torch.tensor([True, False, True]), torch.tensor([[True], [False]])
    check(lambda x, y: (x + y, x * y, x & y, x | y, x ^ y, ~x, torch.logical_xor(x, y), torch.maximum(x, y)), x, y)


def test_bits() -> None:
    x, y = torch.tensor([12, -7, 255]), torch.tensor([3, 1, 2])
    check(lambda x, y: (x & y, x | 6, x ^ y, ~x, x << y, x >> y, x << 2, x >> 1), x, y)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, -2, 0.5, -0.5, 4, 2.5])
def test_power_of_numbers(exponent: float) -> None:
    check(lambda v: v**exponent, randn(6, 3).abs() + 0.3)


def test_power_of_a_number_and_of_integers() -> None:
    check(lambda v: (2.0**v, 3.0**v, 2**v), randn(4, 5))
    check(lambda v: (v**2, v**3, v**5, v**2.0, 2**v), torch.tensor([1, 2, 3]))


def test_ternary() -> None:
    x, y, z = randn(4, 5), randn(4, 5, seed=1), randn(5, seed=2).abs() + 1
    check(
        lambda x, y, z: (torch.addcmul(x, y, z, value=0.3), torch.addcdiv(x, y, z, value=-2), torch.lerp(x, y, z)),
        x,
        y,
        z,
    )
    check(lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, 0.9), torch.add(x, y, alpha=2), torch.rsub(x, y)), x, y)


def test_selection() -> None:
    x, y, m = randn(4, 5), randn(5, seed=1), randn(4, 1, seed=2) > 0
    check(
        lambda x, y, m: (
            torch.where(m, x, y), torch.where(m, x, 0.5), torch.where(m, 2, y), x.masked_fill(m, -math.inf),
            x.clamp(min=0), x.clamp(max=y), x.clamp(-0.5, 0.5), x.clamp_min(0.1), x.clamp_max(y),
        ),
        x, y, m,
    )  # fmt: skip


def test_clamp_of_integers_by_fractions_promotes() -> None:
    check(lambda v: v.clamp(0.5, 2.5), torch.tensor([0, 1, 2, 3]))


def test_conversions() -> None:
    x = torch.tensor([0.0, -1.7, 2.5, 300.7])
    check(lambda v: (v.bool(), v.long(), v.int(), v.double(), v.bfloat16(), v.half(), v.clone()), x)
    check(lambda v: (v.float(), v.to(torch.int8), v.bool()), torch.tensor([0, 1, 127, -4]))


def test_copies_keep_the_layout_eager_gives() -> None:
    x = randn(2, 3, 4, 5).permute(0, 3, 1, 2)
    check(lambda v: (v.clone(), v.contiguous(), v.clone(memory_format=torch.channels_last), v + 1, v.double()), x)


def test_special_functions() -> None:
    x, y = randn(4, 5).abs(), randn(5, seed=1).abs()
    check(lambda x, y: (torch.xlogy(x, y), torch.copysign(x, -1.0)), x, y)


def test_empty_and_scalar_shapes() -> None:
    check(lambda x, y: (x * 2, x + y), randn(0, 5), randn(5))
    check(lambda x, y: (x * 2, x + y), torch.tensor(1.5), torch.tensor([2.0]))


def test_symbolic_sizes() -> None:
    check(lambda x, y: (x + y * 2, x * x.shape[0], x.view(-1).exp()), randn(5, 6), randn(6), symbolic=True)
