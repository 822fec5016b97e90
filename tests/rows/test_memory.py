"""Rows I and U, and those of N about memory: who owns what, who reuses it, what stays without users."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

import dcompile
from dcompile.analyse.lifetime import BEFORE, lifetimes
from dcompile.codegen.cpp import print_cpp
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.types import DType, Value
from dcompile.plan import Home, Plan
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.inline import inline_pointwise
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.simplify import drop_dead, simplify_graph
from tests.inputs import random_inputs
from tests.rows.check import chk, memory
from tests.strategies import graphs
from tests.unit.schedule.passes import context

EVERY_NODE = """
graph g(x: f32[8], y: f32[8], i: i64[3]) {
  a: f32[8] = pointwise (i0: 8) x[i0] * 2.0:f32
  s: f32[] = reduce sum (; r0: 8) a[r0]
  v: f32[4] = view a (i0: 4) -> [2*i0]
  y1: f32[8] = store add y (i0: 3) [q0 | q0 = i[i0]] = 1.0:f32
  p: f32[12] = pack (a, v)
  e: f32[8] = extern aten.relu.default(%a)
  m: f32[8] = extern aten.exp.default(%a) -> aten.exp.out
  q: pending (r: f32[8]) = start all_reduce.sum (m) @dp[2]
  r: f32[8] = wait q
  return %s, %y1, %p, %e, %r
}"""
"""Every kind of node before fusion."""


def planned(text: str) -> Plan:
    return plan_memory(fuse(parse_graph(text).check(), context()), context())


@pytest.mark.row("I1", "A3")
def test_every_value_has_a_name_a_layout_and_an_owner() -> None:
    plan = planned(EVERY_NODE)
    for name, value in plan.graph.defs.items():
        if not isinstance(value, Value):
            continue
        assert value.name == name
        assert len(value.shape) == len(value.stride)
        assert plan.slots[name].storage in plan.storages
    for node in plan.graph.nodes:
        assert isinstance(node.defs, tuple)
        assert isinstance(node.operands, tuple)
        assert set(node.mutates) <= set(node.operands)
        assert isinstance(node.has_effect, bool)
        assert node.rename({}) == node
    with pytest.raises(AttributeError, match="Node does not say what it defines"):
        _ = Node().defs
    assert Value("n", DType.F32, (), ()).numel == 1
    with pytest.raises(ValueError, match="1 sizes but 2 strides"):
        Value("n", DType.F32, (3,), (3, 1))


@pytest.mark.row("I1", "B5", "U4")
def test_values_without_elements_are_not_read() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.relu(x) + 1, x.sum(0), torch.cat([x * 2, y]), (x * 2).t()

    seen = chk(program, torch.empty(0, 5), torch.randn(2, 5))
    assert seen.K <= 2  # the sum of nothing and the concatenation
    only = chk(lambda x: x * 2, torch.empty(0, 3))
    assert only.K == 0
    after = chk(lambda x, y: (x * 2).sum() + y, torch.empty(0, 3), torch.randn(3))
    assert after.K == 1


@pytest.mark.row("I2", "I10")
def test_inputs_and_constants_belong_to_the_caller() -> None:
    table = torch.randn(6, 4)

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + table, (y[1:] * 2 + table[1:]).sum(0)

    seen = chk(program, torch.randn(6, 4), torch.randn(6, 4))
    inputs = seen.plan.graph.input_names
    assert len(inputs) == 3  # the constant is an input nobody passes
    for name in inputs:
        assert seen.plan.storages[seen.plan.slots[name].storage].home is Home.INPUT
    assert not {event.name for event in seen.memory} & inputs
    assert not [name for names in seen.plan.frees.values() for name in names if name in inputs]


@pytest.mark.row("I3")
@given(graphs())
def test_what_a_kernel_reads_and_writes_is_what_its_loops_touch(graph: Graph) -> None:
    """The declared operands against the interpreter: a buffer that is not declared as read may hold anything."""
    fused = fuse(simplify_graph(graph, context()), context())
    for kernel in (node for node in fused.nodes if isinstance(node, Kernel)):
        text = repr(kernel.body)
        for name in kernel.operands:
            assert name in text or name in kernel.targets
        known = set(kernel.operands) | {out.name for out in kernel.outs}
        loaded = {name for name in graph.defs if f"buffer={name!r}" in text}
        assert loaded <= known


@pytest.mark.row("I5")
def test_a_value_that_needs_memory_is_stored_once_with_its_origin() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x.tanh()
        return torch.mm(y, w), torch.mm(w, y), y.t()

    seen = chk(program, torch.randn(5, 5), torch.randn(5, 5), rtol=1e-4, atol=1e-4)
    assert (seen.K, seen.X) == (1, 2)
    (kernel,) = (step for step in seen.schedule if step.kind == "kernel")
    assert kernel.ops == ("aten.tanh.default",)
    assert "aten.tanh.default" in seen.code


@pytest.mark.row("I9")
def test_how_often_a_value_is_read_follows_from_the_graph() -> None:
    before = parse_graph("""graph g(x: f32[4]) {
      a: f32[4] = pointwise (i0: 4) x[i0] + x[i0]
      b: f32[4] = pointwise (i0: 4) a[i0]
      return %b }""")
    assert before.users["a"] == (1,)
    after = inline_pointwise(before, context())
    assert "a" not in after.users
    assert after.users["x"] == (0,)
    assert before.users["a"] == (1,)


@pytest.mark.row("U1")
def test_who_allocates_each_value() -> None:
    plan = planned(EVERY_NODE)
    homes = {name: plan.storages[slot.storage].home for name, slot in plan.slots.items()}
    assert homes["x"] is homes["y"] is homes["y1"] is homes["i"] is Home.INPUT
    assert homes["m"] is Home.ARENA  # an out variant
    assert homes["p"] is homes["s"] is homes["r"] is Home.FRESH  # returned
    assert homes["e"] is Home.LIBRARY
    allocated = {event.name for event in memory(plan) if event.what == "allocate"}
    assert not allocated & {"x", "y", "y1", "v", "e", "q"}


@pytest.mark.row("U2", "T5")
def test_memory_in_flight_is_nobody_elses() -> None:
    text = """
    graph g(x: f32[64]) {
      a: f32[64] = extern aten.exp.default(%x) -> aten.exp.out
      q: pending (r: f32[64]) = start all_reduce.sum (a) @dp[2]
      b: f32[64] = extern aten.sin.default(%x) -> aten.sin.out
      c: f32[64] = extern aten.cos.default(%b) -> aten.cos.out
      r: f32[64] = wait q
      d: f32[64] = extern aten.tan.default(%r) -> aten.tan.out
      e: f32[64] = extern aten.exp.default(%d) -> aten.exp.out
      f: f32[64] = extern aten.add.Tensor(%e, %c)
      return %f
    }"""
    plan = planned(text)
    ranges = {
        name: (storage.arena_offset, int(storage.arena_offset or 0) + int(storage.nbytes))
        for name, storage in plan.storages.items()
        if storage.arena_offset is not None
    }
    for held, other in itertools.product("ar", "bc"):
        assert ranges[held][1] <= ranges[other][0] or ranges[other][1] <= ranges[held][0]  # type: ignore[operator]
    lives = lifetimes(plan.graph)
    assert lives["a"].last == 4  # the wait
    assert lives["x"].first == BEFORE
    # released after the wait and the last reader, as any other memory
    assert ranges["e"] in (ranges["a"], ranges["r"], ranges["b"]) or plan.arena_bytes["cpu"] <= 4 * 256


@pytest.mark.row("U3")
def test_what_stays_without_users() -> None:
    text = """
    graph g(x: f32[8], y: f32[8], z: f32[8]) {
      a: f32[8] = pointwise (i0: 8) x[i0] * 2.0:f32
      b: f32[] = reduce sum (; r0: 8) x[r0]
      v: f32[4] = view x (i0: 4) -> [2*i0]
      y1: f32[8] = store add y (i0: 8) [i0] = 1.0:f32
      p: f32[12] = pack (x, v)
      e: f32[8] = extern aten.relu.default(%x)
      extern mylib.fill.default(%z, 2.0) writes (z) versions (z1: f32[8])
      n: f32[8] = extern aten.rand_like.default(%x) effect
      extern dcompile.check(1, "<", 2, "never") effect
      u: f32[8] = extern c10d.unknown.default(%x) barrier
      q: pending (r: f32[8]) = start all_reduce.sum (x) @dp[2]
      r: f32[8] = wait q
      return
    }"""
    kept = drop_dead(parse_graph(text), context()).nodes
    names = [node.op if isinstance(node, Extern) else type(node).__name__ for node in kept]
    assert names == [
        "Store", "mylib.fill.default", "aten.rand_like.default", "dcompile.check", "c10d.unknown.default", "Start",
        "Wait",
    ]  # fmt: skip


@pytest.mark.row("N1")
def test_one_draw_of_seeds_a_graph() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(torch.nn.functional.dropout(x, 0.5) + 1, 0.5)

    torch.compiler.reset()
    told = dcompile.explain(program, torch.ones(200, requires_grad=True))
    assert sum(graph.library_calls["dcompile.seeds"] for graph in told.graphs) == 1
    compiled = torch.compile(program, backend="dcompile")
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        x = torch.ones(200, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad != 0, y.detach() == 6) or torch.equal(x.grad == 4, y.detach() == 6)
        results.append(y.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert len(set(results[0].tolist())) == 3  # 0, 2 and 6: two masks, unlike each other


CATS: dict[str, Callable[..., Tensor]] = {
    "loops": lambda a, b: torch.cat([a + 1, b * 2]),
    "twice": lambda a, b: torch.cat([(y := a.exp()), y, b]),
    "products": lambda a, b: torch.cat([torch.mm(a, a), b]),
    "columns": lambda a, b: torch.cat([a + 1, b * 2], 1),
    "empty": lambda a, b: torch.cat([a[:0], b, a[:0] * 2]),
}


@pytest.mark.row("N3", "G7")
@pytest.mark.parametrize("form", CATS)
def test_parts_of_a_concatenation_are_computed_where_they_belong(form: str) -> None:
    seen = chk(CATS[form], torch.randn(4, 4), torch.randn(4, 4), rtol=1e-4, atol=1e-4)
    wanted = {"loops": (2, 0, 0), "twice": (2, 0, 1), "products": (1, 1, 0), "columns": (1, 0, 0), "empty": (1, 0, 0)}
    assert (seen.K, seen.X, seen.copies) <= wanted[form]
    assert [event.what for event in seen.memory].count("allocate") == 1


@pytest.mark.row("N3")
def test_concatenations_of_symbolic_sizes_and_layouts() -> None:
    def program(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([a + 1, b * 2]), torch.cat([a, b]) * 2, torch.stack([a, a * 3], 1)

    seen = chk(
        program, torch.randn(4, 6), torch.randn(5, 6), also=[(torch.randn(8, 6), torch.randn(3, 6))], dynamic=True
    )
    assert len(seen.graphs) == 1
    image, other = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    last = torch.channels_last
    chk(lambda a, b: torch.cat([a, b], 1), image.contiguous(memory_format=last), other.contiguous(memory_format=last))
    chk(lambda a, b: torch.cat([a * 2, b], 1), image.contiguous(memory_format=last), other)


@pytest.mark.row("N5")
def test_scratch_memory_lives_for_one_launch() -> None:
    """Kernels keep scratch inside themselves: it is no storage of the plan, and gone when the launch ends."""
    text = """
    graph g(x: f32[6, 8]) {
      y: f32[6, 8] = kernel {
        nest (serial i0: 6) {
          scratch w: f32[8]
          fold (serial r0: 8) {
            let e = exp(x[8*i0 + r0])
            s = sum e
            write w[r0] = e
          }
          nest (simd i1: 8) { write y[8*i0 + i1] = w[i1] / s }
        }
      }
      return %y
    }"""
    graph = parse_graph(text).check()
    plan = plan_memory(graph, context())
    assert set(plan.storages) == {"x", "y"}
    assert "alignas(64) float" in print_cpp(graph).source
    (inputs,) = random_inputs(graph, 1)
    (found,) = run_reference([graph], [inputs])[0]
    assert isinstance(inputs[0], Tensor)
    torch.testing.assert_close(found, inputs[0].softmax(-1))


@pytest.mark.row("A1", "H4")
def test_frozen_nodes_cannot_be_changed_behind_a_reader() -> None:
    node = parse_graph(EVERY_NODE).nodes[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.out = None  # type: ignore[attr-defined,misc]
    assert isinstance(parse_graph(EVERY_NODE).nodes[2], View)
