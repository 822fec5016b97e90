import pytest
import torch

from dcompile.ir.nodes import Extern
from tests.unit.lower.harness import check, externs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_products_write_into_planned_memory() -> None:
    graph = check(
        lambda a, b, c, v: (
            torch.mm(a, b), torch.addmm(c, a, b, beta=0.5, alpha=2), torch.addmm(c[0], a, b), torch.mv(b.t(), v),
            torch.dot(v, v), torch.addmv(c[0], b.t(), v), torch.mm(b.t(), a.t()),
        ),
        randn(3, 4), randn(4, 5, seed=1), randn(3, 5, seed=2), randn(4, seed=3),
    )  # fmt: skip
    calls = [node for node in graph.nodes if isinstance(node, Extern)]
    assert all(node.out_op is not None and node.out_op.endswith(".out") for node in calls)
    assert len(calls) == 7


@pytest.mark.parametrize("symbolic", [False, True])
def test_outer_products_are_loops(symbolic: bool) -> None:
    x, y = randn(3, 4, 1), randn(3, 1, 5, seed=1)
    graph = check(lambda x, y: (torch.bmm(x, y), torch.mm(x[0], y[1])), x, y, symbolic=symbolic)
    assert externs(graph) == []
    check(lambda x, y: torch.bmm(x, y), x.bfloat16(), y.bfloat16())


@pytest.mark.parametrize("symbolic", [False, True])
def test_batched_products(symbolic: bool) -> None:
    x, y, z = randn(2, 3, 4), randn(2, 4, 5, seed=1), randn(2, 3, 5, seed=2)
    check(lambda x, y, z: (torch.bmm(x, y), torch.baddbmm(z, x, y, beta=2), x @ y), x, y, z, symbolic=symbolic)


def test_convolution_and_attention_are_library_calls_on_purpose() -> None:
    graph = check(
        lambda x, w, b: torch.nn.functional.conv2d(x, w, b, 2, 1), randn(2, 3, 8, 8), randn(4, 3, 3, 3), randn(4)
    )
    assert externs(graph) == ["aten.convolution.default"]
    graph = check(
        torch.nn.functional.scaled_dot_product_attention, randn(2, 3, 4, 8), randn(2, 3, 4, 8), randn(2, 3, 4, 8)
    )
    assert externs(graph) == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
