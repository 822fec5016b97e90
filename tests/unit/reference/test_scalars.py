from __future__ import annotations

import math

import pytest
import torch

from dcompile.ir.ops import OPS
from dcompile.ir.types import DType
from dcompile.reference.scalars import FUNCTIONS, apply, normal, philox, uniform


def _split(value: int) -> torch.Tensor:
    """A 64-bit pattern as the i64 that holds it."""
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


@pytest.mark.parametrize(
    ("seed", "offset", "words"),
    [
        # The first row is the all-zero vector of Random123's known-answer file; the others an independent evaluation
        # of the definition in Python integers (see _slow_philox).
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0x0123456789ABCDEF, 0xFEDCBA9876543210, None),
        (2**64 - 1, 2**64 - 1, None),
    ],
)
def test_philox(seed: int, offset: int, words: tuple[int, ...] | None) -> None:
    found = tuple(int(w) for w in philox(_split(seed), _split(offset)))
    assert found == _slow_philox(seed, offset)
    if words is not None:
        assert found == words


def _slow_philox(seed: int, offset: int) -> tuple[int, ...]:
    mask = 2**32 - 1
    counter = [offset & mask, offset >> 32, 0, 0]
    key = [seed & mask, seed >> 32]
    for step in range(10):
        k = [(key[0] + step * 0x9E3779B9) & mask, (key[1] + step * 0xBB67AE85) & mask]
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ k[0], p1 & mask, (p0 >> 32) ^ counter[3] ^ k[1], p0 & mask]
    return tuple(counter)


def test_random_numbers_have_their_distribution() -> None:
    offsets = torch.arange(200_000)
    seed = torch.tensor(-7_654_321_987_654_321)
    u, n = uniform(seed, offsets), normal(seed, offsets)
    assert u.dtype is n.dtype is torch.float32
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(offsets))
    assert bool(torch.isfinite(n).all())
    assert abs(float(n.mean())) < 5 / math.sqrt(len(offsets))
    assert abs(float(n.var()) - 1.0) < 5 * math.sqrt(2 / len(offsets))


def test_every_op_has_a_function() -> None:
    assert set(FUNCTIONS) | {"to", "bitcast"} == set(OPS)


def test_integer_division_rounds_as_its_name_says() -> None:
    a, b = torch.tensor([7, -7, 7, -7]), torch.tensor([2, 2, -2, -2])
    rows = {"floordiv": [3, -4, -4, 3], "truncdiv": [3, -3, -3, 3], "mod": [1, 1, -1, -1], "fmod": [1, -1, 1, -1]}
    for name, expected in rows.items():
        assert apply(name, [a, b], DType.I64).tolist() == expected
        with pytest.raises(ZeroDivisionError):
            apply(name, [a, torch.tensor(0)], DType.I64)


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
@pytest.mark.parametrize("name", ["add", "mul", "exp", "tanh", "rsqrt", "sigmoid", "pow"])
def test_narrow_floats_are_within_one_rounding_of_eager(name: str, dtype: DType) -> None:
    """Not equal: eager's scalar code for the last few elements rounds intermediate results of some ops."""
    args = [torch.rand(1000).to(dtype.torch) + 0.5 for _ in range(OPS[name].arity)]
    found = apply(name, args, dtype)
    assert found.dtype is dtype.torch
    eps = torch.finfo(dtype.torch).eps
    torch.testing.assert_close(found, FUNCTIONS[name](*args), rtol=eps, atol=0.0)
    exact = FUNCTIONS[name](*(a.double() for a in args))
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * eps, atol=0.0)


def test_conversions() -> None:
    x = torch.tensor([-1.7, 0.0, 2.5])
    assert apply("to", [x], DType.I32).tolist() == [-1, 0, 2]
    assert apply("to", [x], DType.BOOL).tolist() == [True, False, True]
    assert apply("bitcast", [x], DType.I32).tolist() == x.view(torch.int32).tolist()
