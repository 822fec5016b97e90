import pytest
import torch

from dcompile.ir.nodes import Extern
from dcompile.lower import lower
from tests.unit.lower.harness import check, interpret, trace


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_filled_tensors() -> None:
    check(
        lambda x: (
            torch.full((2, 3), 1.5), torch.zeros(2, 3, dtype=torch.int32), torch.ones(4, dtype=torch.bool),
            torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 7), x.new_zeros(3), x.new_full((2,), 4),
            torch.scalar_tensor(2.5), torch.full((3,), True), torch.fill(x, 2.0), torch.fill(x, x[0, 0]),
        ),
        randn(3, 4).t(),
    )  # fmt: skip


@pytest.mark.parametrize("bounds", [(5,), (2, 9), (2, 17, 3), (9, 1, -2), (0.5, 4.0, 0.3), (1, 5, 0.5)])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_ranges(bounds: tuple[float, ...], dtype: torch.dtype | None) -> None:
    check(lambda: torch.arange(*bounds, dtype=dtype))


def test_range_of_symbolic_length() -> None:
    check(lambda x: torch.arange(x.shape[0]) + x.shape[1], randn(5, 6), symbolic=True)


@pytest.mark.parametrize("diagonal", [0, 1, -2])
def test_triangles(diagonal: int) -> None:
    check(lambda x: (x.tril(diagonal), x.triu(diagonal), torch.eye(3), torch.eye(2, 4)), randn(2, 4, 5))
    check(lambda x: x.bool().tril(diagonal), randn(4, 4))


def test_uninitialised_memory_comes_from_the_library() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x)

    lowered = lower(trace(lambda x: (torch.empty_like(x), x.new_empty(3, 4)), randn(3, 2).t()), "inference")
    assert [node.op for node in lowered.graph.nodes if isinstance(node, Extern)] == ["aten.empty_strided.default"] * 2
    got = interpret(lowered, randn(3, 2).t())
    assert (got[0].shape, got[0].stride(), got[1].shape) == ((2, 3), (1, 2), (3, 4))
    check(function, randn(3, 2))


def test_constant_tensors_become_literals_or_inputs() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(2.5) + torch.tensor([1.0, -2.0, 3.0])

    graph = check(function, randn(4, 3))
    assert [value.shape for value in graph.inputs] == [(4, 3), (3,)]
