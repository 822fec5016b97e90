"""One training step of each model, compiled, equals eager's: loss, all gradients, all buffers."""

from __future__ import annotations

import pytest
import torch

import dcompile
from benchmarks.models import MODELS, RANDOM, build
from tests.models.judge import judge

LIBRARY_OPS: dict[str, set[str]] = {
    # transformers registers the grouped matmul of its experts as an operator of its own.
    "mixtral": {
        "aten.histc.default",
        "transformers.grouped_mm_fallback.default",
        "transformers.grouped_mm_fallback_backward.default",
    },
    "convnext": {"aten.as_strided_scatter.default"},
    "dlrm": {"aten._embedding_bag.default", "aten._embedding_bag_backward.default"},
    "gnn": {"aten.scatter_reduce.two"},
    "resnet18": {"aten.max_pool2d_with_indices.default", "aten.max_pool2d_with_indices_backward.default"},
    "unet": {"aten.max_pool2d_with_indices.default", "aten.max_pool2d_with_indices_backward.default"},
}
"""The only fallbacks a model may have."""


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_is_eagers(name: str) -> None:
    counted = judge(build(name))
    assert (counted.graphs, counted.graph_breaks) == (2, 0), "one forward and one backward graph"
    assert set(counted.fallbacks) <= LIBRARY_OPS.get(name, set())


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_dropout_is_the_same_in_both_halves_and_under_one_seed(name: str) -> None:
    assert name in RANDOM
    step = build(name, dropout=0.3)
    torch._dynamo.reset()
    compiled = dcompile.compile(step.module)
    parameters = list(step.module.parameters())

    def loss_of(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = compiled(*step.inputs)
        return found

    gradients = torch.autograd.grad(loss_of(1), parameters)
    assert torch.equal(loss_of(1), loss_of(1))
    assert not torch.equal(loss_of(1), loss_of(2))

    # The slope along the gradient, measured with the same masks, is its squared length: only so if both halves agree.
    length = torch.sqrt(sum(g.square().sum() for g in gradients))  # type: ignore[call-overload]
    reach = 5e-3
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * reach / length * gradient
        losses.append(loss_of(1).double())
    slope = (losses[0] - losses[1]) / (2 * reach)
    torch.testing.assert_close(slope.float(), length, rtol=2e-2, atol=0)


def test_a_library_lstm_trains() -> None:
    """Dynamo leaves ``nn.LSTM`` to eager: the graph breaks there, around it everything is compiled."""
    torch._dynamo.reset()
    lstm, head = torch.nn.LSTM(5, 7, batch_first=True), torch.nn.Linear(7, 3)
    x = torch.randn(2, 4, 5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (head(torch.sin(lstm(torch.cos(x))[0])) ** 2).mean()

    parameters = [*lstm.parameters(), *head.parameters()]
    eager = torch.autograd.grad(loss(x), parameters)
    found = torch.autograd.grad(dcompile.compile(loss)(x), parameters)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-7)
