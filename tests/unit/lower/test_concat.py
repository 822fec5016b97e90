import pytest
import torch

from dcompile.ir.nodes import Extern, Pack, Pointwise, View
from tests.unit.lower.harness import check


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim: int, symbolic: bool) -> None:
    check(
        lambda x, y: (torch.cat((x, y, x * 2), dim), torch.cat((x[..., :1], y), -1)),
        randn(3, 3, 3), randn(3, 3, 3, seed=1), symbolic=symbolic,
    )  # fmt: skip


def test_inner_concatenation_is_one_loop() -> None:
    graph = check(lambda x: torch.cat((x[:, 2:], x[:, :2]), 1), randn(3, 4))
    assert [type(node) for node in graph.nodes] == [View, View, Pointwise]


def test_outer_concatenation_is_a_pack() -> None:
    graph = check(lambda x, y: torch.cat((x, y.t())), randn(3, 4), randn(4, 2, seed=1))
    assert [type(node) for node in graph.nodes] == [View, Pointwise, Pack, View]


def test_many_parts_are_copied_by_the_library() -> None:
    graph = check(lambda x: torch.cat([x * n for n in range(9)], 1), randn(3, 4))
    assert isinstance(graph.nodes[-1], Extern)


def test_promotion_and_empty_parts() -> None:
    check(
        lambda x, y: (torch.cat((x, y)), torch.cat((x, y), 1), torch.cat((x, x[:0])), torch.cat((torch.zeros(0), x))),
        randn(3, 4), torch.arange(12).view(3, 4),
    )  # fmt: skip


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_stack(dim: int) -> None:
    check(lambda x, y: torch.stack((x, y, x + y), dim), randn(3, 4), randn(3, 4, seed=1))
