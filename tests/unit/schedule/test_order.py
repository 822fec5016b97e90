from __future__ import annotations

import pytest

from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug
from dcompile.schedule.order import reorder

PROGRAM = """
graph f(x: f32[4], y: f32[4]) {
  p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
  r: f32[4] = wait p
  u: f32[4] = extern aten.relu.default(%y)  # aten.relu.default @model.py:7
  v: f32[4] = extern aten.add.Tensor(%r, %u)
  return %v
}"""


def test_independent_work_moves_between_launch_and_wait() -> None:
    graph = parse_graph(PROGRAM)
    moved = reorder(graph, [0, 2, 1, 3])
    assert moved.nodes == tuple(graph.nodes[n] for n in (0, 2, 1, 3))
    assert moved.outputs == graph.outputs


def test_the_order_as_it_stands_gives_the_same_graph() -> None:
    graph = parse_graph(PROGRAM)
    assert reorder(graph, range(4)) is graph


def test_a_reader_before_its_wait_is_refused_by_name() -> None:
    with pytest.raises(CompilerBug, match=r"v .* would run before r"):
        reorder(parse_graph(PROGRAM), [0, 2, 3, 1])


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4]])
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(CompilerBug, match="permutation"):
        reorder(parse_graph(PROGRAM), order)


def test_a_write_of_a_source_in_flight_is_refused() -> None:
    graph = parse_graph("""
    graph f(x: f32[4]) {
      a: f32[4] = extern aten.relu.default(%x)
      p: pending (r: f32[4]) = start all_reduce.sum (a) @g0[2]
      r: f32[4] = wait p
      b: f32[4] = store set a (i0: 4) [i0] = 1.0:f32
      return %r, %b
    }""")
    with pytest.raises(CompilerBug):
        reorder(graph, [0, 1, 3, 2])


def test_launches_of_one_group_keep_their_order() -> None:
    graph = parse_graph("""
    graph f(x: f32[4], y: f32[4]) {
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      q: pending (s: f32[4]) = start all_reduce.sum (y) @g0[2]
      r: f32[4] = wait p
      s: f32[4] = wait q
      return %r, %s
    }""")
    assert reorder(graph, [0, 1, 3, 2]).nodes[2].defs[0].name == "s"
    with pytest.raises(CompilerBug):
        reorder(graph, [1, 0, 2, 3])
