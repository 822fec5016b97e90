"""Results that take the memory of inputs nobody needs any more: what is saved for a backward graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import dcompile
from dcompile.analyse.verify import verify
from dcompile.capture import tensor_users
from dcompile.collectives.text import parse_graph
from dcompile.errors import UnsafePlan
from dcompile.ir.nodes import Ref
from dcompile.plan import Home, Plan
from dcompile.runtime.arena import alias as arena_alias
from dcompile.runtime.ownership import holders, only_here
from dcompile.schedule.fuse import fuse
from dcompile.schedule.memory import plan_memory
from tests.unit.schedule.passes import context

ROWS = 1024

TEXT = """
graph backward(saved: f32[1024, 512], w: f32[512, 512]) {
  g: f32[1024, 512] = pointwise (i0: 1024, i1: 512) exp(saved[i0, i1])
  dx: f32[1024, 512] = extern aten.mm.default(%g, %w) -> aten.mm.out
  return %dx
}"""


EXTERN = "f32[1024, 512] = extern aten.mm.default(%saved, %w) -> aten.mm.out"


def planned(text: str) -> Plan:
    ctx = context()
    return plan_memory(fuse(parse_graph(text).check(), ctx), ctx)


def test_a_backward_result_may_take_the_memory_of_what_was_saved() -> None:
    plan = planned(TEXT)
    storage = plan.storages["g"]
    assert (storage.home, storage.donor) == (Home.FRESH, "saved")
    assert plan.arena_bytes == {}
    verify(plan)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("backward", "forward"),
        TEXT.replace("return %dx", "return %dx, %saved"),
        TEXT.replace("1024", "16"),
        TEXT.replace(
            "return %dx", "e: f32[1024, 512] = extern aten.mm.default(%saved, %w) -> aten.mm.out\n return %dx, %e"
        ),
    ],
    ids=["forward", "returned", "small", "read later"],
)
def test_other_inputs_are_left_alone(text: str) -> None:
    assert all(storage.donor is None for storage in planned(text).storages.values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: replace(plan, graph=replace(plan.graph, outputs=(*plan.graph.outputs, Ref("saved")))),
        lambda plan: replace(plan, storages={**plan.storages, "g": replace(plan.storages["g"], donor="w")}),
        lambda plan: replace(plan, storages={**plan.storages, "g": replace(plan.storages["g"], nbytes=64)}),
    ],
    ids=["returned", "another input", "other size"],
)
def test_the_verifier_refuses_an_input_that_is_still_needed(spoil: Callable[[Plan], Plan]) -> None:
    plan = planned(TEXT)
    if "saved" not in plan.graph.input_names:
        pytest.fail("the plan has no saved input")
    with pytest.raises(UnsafePlan):
        verify(spoil(plan))


class _Seen:
    def take(self, tensor: torch.Tensor) -> bool:
        return holders(tensor, tensor_users) == only_here(tensor_users)


def test_every_way_to_hold_a_tensor_is_seen() -> None:
    rt = _Seen()
    x = torch.randn(4)
    assert rt.take(x)
    again = x
    assert not rt.take(x)
    del again
    view = x.view(2, 2)
    assert not rt.take(x)
    del view
    storage = x.untyped_storage()
    assert not rt.take(x)
    del storage
    y = torch.randn(4, requires_grad=True)
    z = x * y  # autograd keeps x
    assert not rt.take(x)
    del z
    assert rt.take(x)


def run(retain: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of two backward calls through dcompile, and eager's."""
    torch.manual_seed(0)
    x, w = torch.randn(ROWS, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(x @ w, -1)

    def gradients(call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        y = call(x, w)
        first = torch.autograd.grad(y.sum(), (x, w), retain_graph=retain)
        return [*first, *(torch.autograd.grad(y.sum(), (x, w)) if retain else ())]

    return gradients(torch.compile(f, backend=dcompile.backend.backend(dcompile.Options(cache_dir=None)))), gradients(f)


@pytest.mark.parametrize("retain", [False, True])
def test_gradients_are_right_whoever_holds_what_was_saved(retain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Tensor] = []

    def alias(base: torch.Tensor, *layout: Any) -> torch.Tensor:
        taken.append(base)
        return arena_alias(base, *layout)

    monkeypatch.setattr("dcompile.runtime.program.alias", alias)
    found, wanted = run(retain)
    assert len(taken) == 1  # by the last backward call, which keeps nothing
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
