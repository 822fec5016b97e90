"""Gathers that depend on inputs alone are placed where they are due, before the reductions they would queue behind."""

from __future__ import annotations

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel, Roofline
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.overlap import overlap
from dcompile.schedule.prefetch import prefetch
from dcompile.schedule.simulate import prepare, simulate
from tests.strategies import assert_same, copy_inputs, random_inputs

COSTS = CostModel(
    {"cpu": Roofline(flops_per_us=1e4, bytes_per_us=1e4, launch_us=1.0, call_us=1.0)},
    {"*": LinkModel(alpha_us=1.0, bytes_per_us=1e3, contention=0.0)},
)
"""A product of 64 x 64 matrices takes about 53 us, a gather or reduction of 16 KiB about 10 us."""

BACKWARD = """
graph f(dy: f32[64, 64], w2: f32[64, 64], s1: f32[32, 64], s0: f32[32, 64]) {
  d2: f32[64, 64] = extern aten.mm.default(%dy, %w2)
  g2: f32[64, 64] = extern aten.mm.default(%d2, %dy)
  p2: pending (r2: f32[32, 64]) = start reduce_scatter.sum (g2) @g0[2]
  r2: f32[32, 64] = wait p2
  q1: pending (w1: f32[64, 64]) = start all_gather (s1) @g0[2]
  w1: f32[64, 64] = wait q1
  d1: f32[64, 64] = extern aten.mm.default(%d2, %w1)
  g1: f32[64, 64] = extern aten.mm.default(%d1, %dy)
  p1: pending (r1: f32[32, 64]) = start reduce_scatter.sum (g1) @g0[2]
  r1: f32[32, 64] = wait p1
  c0: f32[32, 64] = pointwise (i0: 32, i1: 64) s0[i0, i1] * 2.0:f32
  q0: pending (w0: f32[64, 64]) = start all_gather (c0) @g0[2]
  w0: f32[64, 64] = wait q0
  d0: f32[64, 64] = extern aten.mm.default(%d1, %w0)
  return %r2, %r1, %d0
}"""


def _names(graph: Graph) -> list[str]:
    return [definition.name for node in graph.nodes for definition in node.defs]


def _run(graph: Graph) -> float:
    return simulate(prepare(graph, COSTS), range(len(graph.nodes))).makespan


def test_gathers_stand_before_the_reductions_in_front_of_their_reader() -> None:
    before = parse_graph(BACKWARD).check()
    after = prefetch(before, COSTS)
    names = _names(after)
    assert names.index("q1") < names.index("p2")
    assert names.index("c0") < names.index("q0") < names.index("p1")
    assert names.index("q0") > names.index("d2"), "no earlier than it is due"
    assert sorted(names) == sorted(_names(before))


def test_the_schedule_gains_and_numbers_stay() -> None:
    before = parse_graph(BACKWARD).check()
    ctx = Context(Options(bucket_bytes=1), COSTS)
    after = overlap(bucket_collectives(before, ctx), ctx)
    assert _run(after) < _run(overlap(before, ctx))
    inputs = random_inputs(before, 2)
    expected = run_reference([before] * 2, copy_inputs(inputs))
    assert_same(run_reference([after] * 2, copy_inputs(inputs)), expected)


def test_a_launch_that_stands_too_early_is_put_where_it_is_due() -> None:
    early = """
    graph f(x: f32[64, 64], s: f32[32, 64]) {
      q: pending (w: f32[64, 64]) = start all_gather (s) @g0[2]
      a: f32[64, 64] = extern aten.mm.default(%x, %x)
      b: f32[64, 64] = extern aten.mm.default(%a, %x)
      c: f32[64, 64] = extern aten.mm.default(%b, %x)
      p: pending (r: f32[64, 64]) = start all_reduce.sum (c) @g0[2]
      r: f32[64, 64] = wait p
      w: f32[64, 64] = wait q
      d: f32[64, 64] = extern aten.mm.default(%c, %w)
      return %d, %r
    }"""
    names = _names(prefetch(parse_graph(early).check(), COSTS))
    assert names.index("b") < names.index("q") < names.index("p")


def test_what_depends_on_a_product_or_another_collective_stays() -> None:
    anchored = """
    graph f(x: f32[64, 64], s: f32[32, 64]) {
      a: f32[64, 64] = extern aten.mm.default(%x, %x)
      b: f32[64, 64] = pointwise (i0: 64, i1: 64) a[i0, i1] + 1.0:f32
      p: pending (r: f32[128, 64]) = start all_gather (b) @g0[2]
      r: f32[128, 64] = wait p
      q: pending (t: f32[256, 64]) = start all_gather (r) @g0[2]
      t: f32[256, 64] = wait q
      return %t
    }"""
    graph = parse_graph(anchored).check()
    assert print_graph(prefetch(graph, COSTS)) == print_graph(graph)
