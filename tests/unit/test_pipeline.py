"""The table of passes: names, levels, what can be skipped; and what one compile counts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dcompile
from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug, DCompileError
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Pointwise, Reduction, Store
from dcompile.options import Options
from dcompile.pipeline import PASSES, Level, Pass, graph_refusal, passes, run_passes, written_inputs
from dcompile.plan import Plan
from dcompile.watch import Watch
from examples.train_gpt import GPT, VOCAB, Shape

PROGRAM = """
graph backward(x: f32[4, 8], w: f32[8, 16]) {
  a: f32[4, 8] = pointwise (i0: 4, i1: 8) tanh(x[i0, i1])
  g: f32[8] = reduce sum (i0: 8; r0: 4) a[r0, i0]
  p: pending in place (m: f32[8]) = start all_reduce.sum (g) @g0[2]
  m: f32[8] = wait p
  y: f32[4, 16] = extern aten.mm.default(%a, %w) -> aten.mm.out
  return %m, %y
}
"""


def _run(graph: Graph, **options: object) -> Plan:
    chosen = replace(Options(), **options)  # type: ignore[arg-type]
    return run_passes(graph, Context(chosen, CostModel.analytical("cpu", 2)), Watch(chosen, graph.name))


def test_levels_of_neighbouring_passes_fit() -> None:
    assert PASSES[0].takes is Level.LOOPS
    assert PASSES[-1].gives is Level.ORDERED
    for before, after in itertools.pairwise(PASSES):
        assert before.gives is after.takes, f"{before.name} -> {after.name}"


def test_a_pass_that_changes_the_level_of_the_nodes_cannot_be_skipped() -> None:
    assert [step.name for step in PASSES if step.gives is Level.KERNELS and step.takes is Level.LOOPS] == ["fuse"]
    assert {step.name for step in PASSES if not step.optional} == {"simplify_graph", "fuse"}


def test_names_are_those_of_the_functions_and_unique() -> None:
    names = [step.name for step in PASSES]
    assert len(set(names)) == len(names)
    assert all(getattr(passes, name) is step.run for name, step in zip(names, PASSES, strict=True))


@pytest.mark.parametrize("name", [step.name for step in PASSES if step.optional])
def test_a_skipped_pass_does_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def recording(step: Pass) -> Pass:
        def run(graph: Graph, ctx: Context) -> Graph:
            ran.append(step.name)
            return step.run(graph, ctx)

        run.__name__ = step.name
        return replace(step, run=run)

    monkeypatch.setattr(passes, "PASSES", tuple(map(recording, PASSES)))
    _run(parse_graph(PROGRAM), skip=frozenset({name}))
    assert ran == [step.name for step in PASSES if step.name != name]


@pytest.mark.parametrize("name", ["fuse", "simplify_graph", "plan_memory", "overlapp"])
def test_what_cannot_be_skipped_is_named_with_what_can(name: str) -> None:
    with pytest.raises(DCompileError, match=rf"cannot skip {name}; passes that can be skipped: .*overlap"):
        _run(parse_graph(PROGRAM), skip=frozenset({"overlap", name}))


@pytest.mark.parametrize("name", ["fuse", "overlap"])
def test_a_pass_that_leaves_the_wrong_nodes_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = parse_graph(PROGRAM)

    def broken(graph: Graph, ctx: Context) -> Graph:
        return loops

    broken.__name__ = name
    steps = tuple(replace(step, run=broken) if step.name == name else step for step in PASSES)
    monkeypatch.setattr(passes, "PASSES", steps)
    with pytest.raises(CompilerBug, match=f"backward: a Pointwise is left after {name}"):
        _run(loops)


def test_kernels_before_lowering_is_done_are_refused() -> None:
    loops = parse_graph(PROGRAM)
    kernels = _run(loops).graph
    assert not any(isinstance(node, Pointwise | Reduction | Store) for node in kernels.nodes)
    with pytest.raises(CompilerBug, match="a Kernel is left after lower"):
        _run(kernels)


def test_the_plan_carries_prediction_and_decisions() -> None:
    plan = _run(parse_graph(PROGRAM))
    assert plan.prediction is not None
    assert plan.prediction.lower_bound_us <= plan.prediction.makespan_us <= plan.prediction.program_order_us
    assert "overlap" in {verdict.stage for verdict in plan.verdicts}


def _kernels_and_launches(layers: int) -> tuple[int, int]:
    torch.compiler.reset()
    dcompile.reset_counters()
    model = GPT(Shape(layers, width=32, heads=2, context=16))
    tokens, targets = torch.randint(VOCAB, (2, 2, 16))
    torch.compile(model, backend="dcompile")(tokens, targets).backward()
    counted = dcompile.counters()
    return counted.kernels, counted.kernel_launches


def test_identical_blocks_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path))
    (kernels, launches), (more_kernels, more_launches) = map(_kernels_and_launches, (2, 5))
    assert more_kernels == kernels
    assert more_launches >= launches + 3 * 10, "a block launches more than ten kernels, forward and backward"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("graph f(x: f32[4]@cuda) {\n  y: f32[4]@cuda = pointwise (i0: 4) neg(x[i0])\n  return %y\n}", ""),
        ("graph f(x: f32[4]) {\n  y: f32[4] = pointwise (i0: 4) neg(x[i0])\n  return %y\n}", "CPU"),
        ("graph f(x: f32[s0]@cuda, s0: size = 4) {\n  y: f32[s0]@cuda = pointwise (i0: s0) neg(x[i0])\n  return %y\n}",
         "sizes"),
        ("graph f(x: f32[4]@cuda) {\n  p: pending (y: f32[4]@cuda) = start all_reduce.sum (x) @g[2]\n"
         "  y: f32[4]@cuda = wait p\n  return %y\n}", "collectives"),
    ],
)  # fmt: skip
def test_why_a_program_cannot_be_a_cuda_graph(text: str, reason: str) -> None:
    found = graph_refusal(parse_graph(text))
    assert reason in found
    assert bool(found) == bool(reason)


def test_written_inputs_are_found_through_views() -> None:
    text = """graph f(x: f32[4]@cuda, y: f32[2]@cuda) {
  v: f32[2]@cuda = view x (i0: 2) -> [i0]
  x2: f32[2]@cuda = store set v (i0: 2) [i0] = y[i0]
  return %y
}"""
    assert written_inputs(parse_graph(text)) == (0,)
