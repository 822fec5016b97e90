"""Ops that take programs, and what Dynamo makes of checkpointing, custom gradients and function transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._higher_order_ops.invoke_subgraph import mark_compile_region
from torch._higher_order_ops.map import map as map_along
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import dcompile
from tests.rows.check import Seen, chk


def test_a_while_loop_runs_its_compiled_body() -> None:
    def doubled(x: Tensor, stop: Tensor) -> Any:
        return while_loop(lambda n, y: n < stop, lambda n, y: (n + 1, (y * 2).sin()), (torch.tensor(0), x))

    x = torch.randn(3)
    seen = chk(doubled, x, torch.tensor(3), also=[(x, torch.tensor(0)), (x, torch.tensor(1))])
    assert seen.fallbacks == ()
    assert len(seen.graphs[0].inner) == 2


LOOPS: dict[str, tuple[Callable[..., Any], bool]] = {
    "map": (lambda x: map_along(lambda row: row.sin() + 1, x), True),
    "scan": (lambda x: scan(lambda c, row: (c + row, c * row), torch.zeros(3), x, dim=0)[1], True),
    "scan backwards": (lambda x: scan(lambda c, r: (c + r, c * r), torch.zeros(3), x, dim=0, reverse=True), False),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_along_a_dimension(name: str) -> None:
    function, grad = LOOPS[name]
    seen = chk(function, torch.randn(4, 3, requires_grad=grad), grad=grad)
    assert seen.fallbacks == ()
    assert all(built.inner for built in seen.graphs)


def test_a_marked_region_is_compiled_once() -> None:
    @mark_compile_region
    def region(x: Tensor) -> Tensor:
        return x.sin() * 2

    seen = chk(lambda x: region(region(x)) + 1, torch.randn(4))
    assert seen.externs == ("dcompile.invoke_subgraph",) * 2
    assert len(seen.graphs[0].inner) == 1
    chk(lambda x: region(region(x)).sum(), torch.randn(4, requires_grad=True), grad=True)


def test_other_ops_over_programs_are_named_library_calls() -> None:
    def attention(q: Tensor) -> Any:
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + i - j)

    seen = chk(attention, torch.randn(1, 2, 128, 16))
    assert seen.fallbacks == ("higher_order.flex_attention",)


def saved(seen: Seen) -> int:
    """Tensors the forward graph hands to the backward graph."""
    return len(seen.plans[1].graph.input_names)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_is_honoured(dropout: float) -> None:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.Sigmoid())

    def checkpointed(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)

    x = torch.randn(4, 8, requires_grad=True)
    if dropout:  # the masks of eager and of the compiler differ; forward and backward must use the same one
        compiled = torch.compile(checkpointed, backend="dcompile", options={"cache_dir": None})
        torch.manual_seed(7)
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        difference = torch.zeros_like(x)
        for position in ((0, 0), (2, 5)):
            step = torch.zeros_like(x)
            step[position] = 1e-2
            values = []
            for sign in (1, -1):
                torch.manual_seed(7)
                values.append(compiled(x + sign * step).sum())
            difference[position] = (values[0] - values[1]) / 2e-2
            torch.testing.assert_close(gradient[position], difference[position], rtol=2e-2, atol=2e-4)
        return
    with_checkpoint = chk(checkpointed, x, grad=True)
    without = chk(layers, x, grad=True)
    assert saved(with_checkpoint) < saved(without)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.exp() * 2


def test_custom_gradients() -> None:
    seen = chk(lambda x: Doubled.apply(x).sum(), torch.randn(3, requires_grad=True), grad=True)
    assert seen.X == 0


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "vmap": lambda x: torch.vmap(lambda row: row.sin() * row.sum())(x),
    "grad": lambda x: torch.func.grad(lambda y: y.sin().sum())(x),
    "jacrev": lambda x: torch.func.jacrev(lambda y: y.sin() * y.sum())(x[0]),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),)),
    "grad of vmap": lambda x: torch.func.grad(lambda y: torch.vmap(torch.cos)(y).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name: str) -> None:
    chk(TRANSFORMS[name], torch.randn(4, 3))


def test_tensors_made_of_constants() -> None:
    dcompile.reset_counters()
    seen = chk(lambda x: x + torch.tensor(5.0) + torch.tensor([1.0, 2.0, 3.0]), torch.randn(4, 3))
    assert seen.K == 1
