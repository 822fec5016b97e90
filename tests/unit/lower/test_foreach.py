import pytest
import torch

from tests.unit.lower.harness import check


def lists(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).abs() + 0.5 for shape in ((3, 4), (5,), (2, 1, 2))]


X, Y, Z = lists(), lists(1), lists(2)

CALLS = {
    "add": lambda x, y, z: [*torch._foreach_add(x, y, alpha=2), *torch._foreach_add(x, 1.5)],
    "sub": lambda x, y, z: [*torch._foreach_sub(x, y, alpha=0.5), *torch._foreach_sub(x, 2)],
    "mul": lambda x, y, z: [*torch._foreach_mul(x, y), *torch._foreach_mul(x, 2.5), *torch._foreach_mul(x, z[0][0, 0])],
    "div": lambda x, y, z: [*torch._foreach_div(x, y), *torch._foreach_div(x, [2.0, 3.0, 4.0])],
    "bounds": lambda x, y, z: [
        *torch._foreach_maximum(x, y), *torch._foreach_minimum(x, 1.0), *torch._foreach_clamp_min(x, 1.0),
        *torch._foreach_clamp_max(x, y),
    ],
    "addcmul": lambda x, y, z: [
        *torch._foreach_addcmul(x, y, z, value=0.3), *torch._foreach_addcmul(x, y, z, [1.0, 2.0, 3.0]),
    ],
    "addcdiv": lambda x, y, z: [
        *torch._foreach_addcdiv(x, y, z, value=-2.0), *torch._foreach_addcdiv(x, y, z, [1.0, 2.0, 3.0]),
    ],
    "lerp": lambda x, y, z: [*torch._foreach_lerp(x, y, 0.1), *torch._foreach_lerp(x, y, z)],
    "pow": lambda x, y, z: [*torch._foreach_pow(x, 2), *torch._foreach_pow(x, y), *torch._foreach_pow(0.9, x)],
    "unary": lambda x, y, z: [
        *torch._foreach_sqrt(x), *torch._foreach_neg(x), *torch._foreach_exp(x), *torch._foreach_reciprocal(x),
        *torch._foreach_abs(x), *torch._foreach_log(x), *torch._foreach_tanh(x),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_list_ops(name: str) -> None:
    check(CALLS[name], X, Y, Z)


def test_integers_are_left_to_the_library() -> None:
    check(lambda x: torch._foreach_add(x, 1.5), [torch.arange(4), torch.arange(3)], library=True)


def test_list_ops_in_place_write_their_lists() -> None:
    def function(x: list[torch.Tensor], y: list[torch.Tensor]) -> list[torch.Tensor]:
        fresh = [t * 1.0 for t in x]
        torch._foreach_mul_(fresh, y)
        return fresh

    check(function, X, Y, library=True)
