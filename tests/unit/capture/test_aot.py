"""capture(): forward, backward and inference graphs of single-process programs, run with eager ops."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dcompile.capture import graph_breaks, reset_graph_breaks
from tests.multi_gpu.eager_backend import EagerBackend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    reset_graph_breaks()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.batch_norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.batch_norm(nn.functional.gelu(y).transpose(1, 2)).transpose(1, 2)
        return torch.softmax(self.out(y), -1)


def test_training_step_equals_eager() -> None:
    model, backend = Block(), EagerBackend()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 5, 16)
    results = []
    for m in (compiled, reference):
        loss = (m(x) ** 2).sum()
        loss.backward()
        results.append(loss)
    torch.testing.assert_close(*results)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())  # running statistics
    assert backend.kinds() == ["forward", "backward"]
    assert graph_breaks() == 0


def test_graph_keeps_library_ops_whole_and_breaks_up_the_rest() -> None:
    backend = EagerBackend()
    torch.compile(Block(), backend=backend)(torch.randn(3, 5, 16)).sum().backward()
    names = {op.split(".")[1] for op in backend.ops(0) + backend.ops(1)}
    assert {"addmm", "mm", "_scaled_dot_product_flash_attention_for_cpu"} <= names
    assert not names & {"native_layer_norm", "gelu", "_softmax", "_softmax_backward_data", "detach", "silu"}


def test_names_pair_forward_and_backward() -> None:
    backend = EagerBackend()
    for scale in (2.0, 3.0):
        x = torch.randn(4, requires_grad=True)
        torch.compile(lambda x, s=scale: (x * s).sin(), backend=backend)(x).sum().backward()
    numbers = [captured.name.removeprefix(captured.kind) for captured in backend.graphs]
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]
    with torch.no_grad():
        torch.compile(lambda x: x.cos() + 1, backend=backend)(torch.randn(4))
    assert backend.kinds() == ["forward", "backward"] * 2 + ["inference"]


def test_example_inputs_fit_the_placeholders() -> None:
    backend = EagerBackend()
    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.randn(3, 7))
    (captured,) = backend.graphs
    placeholders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(captured.example_inputs) == 3  # two sizes and a tensor
    assert sorted(type(value).__name__ for value in captured.example_inputs) == ["FakeTensor", "SymInt", "SymInt"]


def test_graph_can_be_retained() -> None:
    x = torch.randn(4, requires_grad=True)
    y = torch.compile(lambda x: x.sin().exp().sum(), backend=EagerBackend())(x)
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_graph_can_be_retained_after_one_that_was_not() -> None:
    x, w = torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)
    f = torch.compile(lambda x, w: torch.tanh(x @ w).exp().sum(), backend=EagerBackend())
    f(x, w).backward()
    once = w.grad
    w.grad = None
    loss = f(x, w)
    loss.backward(retain_graph=True)
    loss.backward()
    assert once is not None
    torch.testing.assert_close(w.grad, 2 * once)


def test_input_mutation_is_a_copy_at_the_end() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.mul_(3)
        return x + 1

    backend = EagerBackend()
    x = torch.randn(5)
    y = x.clone()
    torch.testing.assert_close(torch.compile(f, backend=backend)(x), f(y))
    torch.testing.assert_close(x, y)
    assert backend.ops(0)[-1] == "aten.copy_.default"


def test_dropout_under_checkpointing_stays_one_op() -> None:
    layer, head = nn.Linear(8, 8), nn.Linear(8, 8)

    def f(x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda y: head(nn.functional.dropout(torch.tanh(layer(y)), 0.5)), x, use_reentrant=False)
        return hidden.sum()

    backend = EagerBackend()
    torch.compile(f, backend=backend)(torch.randn(4, 8)).backward()
    targets = [str(node.target) for captured in backend.graphs for node in captured.gm.graph.nodes]
    assert targets.count("aten.native_dropout.default") == 1
    assert not [target for target in targets if "rng_state" in target]
    assert "aten.tanh.default" in backend.ops(1)  # the rest is recomputed


def test_graph_breaks_are_counted() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    torch.compile(f, backend=EagerBackend())(torch.randn(3))
    assert graph_breaks() == 1
    reset_graph_breaks()
    assert graph_breaks() == 0


def test_inputs_are_cleared_before_the_program_returns() -> None:
    seen: list[Any] = []

    class Spy(EagerBackend):
        def _compile(self, captured: Any) -> Any:
            run = super()._compile(captured)

            def call(inputs: list[Any]) -> Any:
                result = run(inputs)
                seen.append(list(inputs))
                return result

            return call

    torch.compile(lambda x: x * 2, backend=Spy())(torch.randn(3))
    assert seen == [[]]
