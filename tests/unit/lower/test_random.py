import pytest
import torch

from dcompile.ir.nodes import Extern
from dcompile.lower import lower
from tests.unit.lower.harness import fallbacks, interpret, trace

aten = torch.ops.aten


def draw(function: object, *args: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    lowered = lower(trace(function, *args), "forward")  # type: ignore[arg-type]
    assert fallbacks(lowered.graph) == []
    torch.manual_seed(seed)
    return interpret(lowered, *args)


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    out, mask = draw(lambda x: aten.native_dropout(x, 0.3, True), x)
    torch.testing.assert_close(out, x * mask / 0.7)
    assert mask.dtype is torch.bool
    assert abs(mask.double().mean() - 0.7) < 0.02


def test_dropout_at_the_ends() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept, all_true = draw(lambda x: aten.native_dropout(x, 0.0, True), x)
    idle, _ = draw(lambda x: aten.native_dropout(x, 0.5, False), x)
    none, all_false = draw(lambda x: aten.native_dropout(x, 1.0, True), x)
    assert torch.equal(kept, x)
    assert torch.equal(idle, x)
    assert all_true.all()
    assert not none.any()
    assert not all_false.any()


def test_dropout_gradient_uses_the_mask() -> None:
    g, m = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.eye(6, 5).bool()
    (got,) = draw(lambda g, m: aten.native_dropout_backward(g, m, 2.0), g, m)
    torch.testing.assert_close(got, g * m * 2.0)


def test_masks_differ_within_a_program_and_follow_the_generator() -> None:
    x = torch.ones(64, 64)

    def two(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return aten.native_dropout(x, 0.5, True)[1], aten.native_dropout(x, 0.5, True)[1]

    first, second = draw(two, x)
    again, _ = draw(two, x)
    other, _ = draw(two, x, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_one_draw_of_seeds_serves_all_random_ops() -> None:
    lowered = lower(trace(lambda x: (torch.rand_like(x), torch.randn(5), torch.bernoulli(x)), torch.rand(4)), "forward")
    calls = [node for node in lowered.graph.nodes if isinstance(node, Extern) and node.op.startswith("dcompile.")]
    assert [(node.op, node.args, node.effect) for node in calls] == [("dcompile.seeds", (3,), True)]


@pytest.mark.parametrize("wrong", [1.5, -0.25, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_probability_is_rejected(wrong: float, dtype: torch.dtype) -> None:
    chances = torch.tensor([0.5, 0.0, wrong, 1.0], dtype=dtype)
    with pytest.raises(RuntimeError):
        torch.bernoulli(chances)
    with pytest.raises(RuntimeError, match="bernoulli: a probability is not between 0 and 1"):
        draw(torch.bernoulli, chances)
    with pytest.raises(RuntimeError, match="bernoulli with probability"):
        draw(lambda x: aten.bernoulli.p(x, wrong), chances)


def test_distributions() -> None:
    p = torch.tensor([0.2, 0.8]).repeat(5000, 1)
    uniform, normal, coin, fixed = draw(
        lambda p: (torch.rand_like(p), torch.randn(5000, 2), torch.bernoulli(p), aten.bernoulli.p(p, 0.3)), p
    )
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(normal.mean()) < 0.04
    assert abs(normal.std() - 1) < 0.04
    torch.testing.assert_close(coin.mean(0), torch.tensor([0.2, 0.8]), atol=0.03, rtol=0)
    assert abs(fixed.mean() - 0.3) < 0.03


def test_narrow_uniform_numbers_stay_below_one() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (got,) = draw(lambda dtype=dtype: (torch.rand(100, 100, dtype=dtype),))
        assert got.dtype is dtype
        assert got.min() >= 0
        assert got.max() < 1
