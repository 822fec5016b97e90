"""Order rules: by storage, in flight, launches, effects and barriers; and the legality check against brute force."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from dcompile.analyse.dependence import is_legal, predecessors
from dcompile.collectives.group import Group
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.collectives.text import parse_graph
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Node, Pointwise, Ref
from dcompile.ir.types import DType, Value


def must_precede(text: str) -> set[tuple[str, str]]:
    """All direct orders, by the first name each node defines."""
    graph = parse_graph(text)
    names = [node.defs[0].name for node in graph.nodes]
    return {(names[b], names[n]) for n, before in enumerate(predecessors(graph)) for b in before}


def legal_names(graph: Graph, *names: str) -> bool:
    where = {node.defs[0].name: n for n, node in enumerate(graph.nodes)}
    return is_legal(graph, [where[name] for name in names])


def test_a_write_follows_earlier_readers_and_precedes_later_ones() -> None:
    text = """graph g(x: f32[4], y: f32[4]) {
      old: f32[4] = pointwise (i0: 4) x[i0] * 2.0:f32
      free: f32[4] = pointwise (i0: 4) y[i0] * 2.0:f32
      x2: f32[4] = store set x (i0: 4) [i0] = y[i0]
      new: f32[4] = pointwise (i0: 4) x2[i0] * 2.0:f32
      x3: f32[4] = store add x2 (i0: 4) [i0] = y[i0]
      return %old, %free, %new, %x3
    }"""
    assert must_precede(text) == {("old", "x2"), ("x2", "new"), ("x2", "x3"), ("new", "x3")}


def test_readers_through_views_count() -> None:
    text = """graph g(x: f32[4, 4], y: f32[4, 4]) {
      v: f32[4] = view x (i0: 4) -> [0, i0]
      old: f32[4] = pointwise (i0: 4) v[i0] * 2.0:f32
      x2: f32[4, 4] = store set x (i0: 4, i1: 4) [i0, i1] = y[i0, i1]
      return %old, %x2
    }"""
    assert ("old", "x2") in must_precede(text)


IN_PLACE = """graph g(x: f32[4], y: f32[4]) {
  g: f32[4] = pointwise (i0: 4) y[i0] * 3.0:f32
  early: f32[4] = pointwise (i0: 4) g[i0] + 1.0:f32
  p: pending in place (r: f32[4]) = start all_reduce.sum (g) @g0[2]
  other: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
  r: f32[4] = wait p
  late: f32[4] = pointwise (i0: 4) r[i0] + 1.0:f32
  return %early, %other, %late
}"""


def test_in_place_nobody_touches_the_buffer_in_flight() -> None:
    graph = parse_graph(IN_PLACE)
    assert legal_names(graph, "g", "early", "p", "other", "r", "late")
    assert legal_names(graph, "other", "g", "early", "p", "r", "late")
    assert not legal_names(graph, "g", "p", "early", "other", "r", "late")
    assert not legal_names(graph, "g", "p", "other", "r", "early", "late")
    assert not legal_names(graph, "g", "early", "p", "late", "other", "r")


OUT_OF_PLACE = """graph g(x: f32[4], y: f32[4]) {
  p: pending (r: f32[8]) = start all_gather (x) @g0[2]
  read: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
  r: f32[8] = wait p
  x2: f32[4] = store set x (i0: 4) [i0] = y[i0]
  return %read, %r, %x2
}"""


def test_out_of_place_sources_may_be_read_but_not_written_in_flight() -> None:
    graph = parse_graph(OUT_OF_PLACE)
    assert legal_names(graph, "p", "read", "r", "x2")
    assert legal_names(graph, "read", "p", "r", "x2")
    assert not legal_names(graph, "p", "read", "x2", "r")
    assert not legal_names(graph, "p", "r", "x2", "read")


def test_program_order_that_touches_a_buffer_in_flight_is_illegal() -> None:
    graph = parse_graph(
        """graph g(x: f32[4], y: f32[4]) {
          p: pending (r: f32[8]) = start all_gather (x) @g0[2]
          x2: f32[4] = store set x (i0: 4) [i0] = y[i0]
          r: f32[8] = wait p
          return %r, %x2
        }"""
    )
    assert not is_legal(graph, range(3))


def test_slices_of_one_buffer_fly_side_by_side_but_not_over_each_other() -> None:
    def program(offset: int) -> Graph:
        return parse_graph(
            f"""graph g(x: f32[8]) {{
              a: f32[4] = view x (i0: 4) -> [i0]
              p: pending in place (r: f32[4]) = start all_reduce.sum (a) @g0[2]
              b: f32[4] = view x (i0: 4) -> [i0 + {offset}]
              q: pending in place (s: f32[4]) = start all_reduce.sum (b) @g0[2]
              r: f32[4] = wait p
              s: f32[4] = wait q
              return %r, %s
            }}"""
        )

    assert is_legal(program(4), range(6))
    assert not is_legal(program(3), range(6))


def test_launches_of_one_group_keep_their_order_and_other_groups_do_not_care() -> None:
    def program(second: str) -> str:
        return f"""graph g(x: f32[4], y: f32[4]) {{
          p: pending (r: f32[8]) = start all_gather (x) @g0[2]
          q: pending (s: f32[8]) = start all_gather (y) @{second}[2]
          r: f32[8] = wait p
          s: f32[8] = wait q
          return %r, %s
        }}"""

    same, apart = parse_graph(program("g0")), parse_graph(program("g1"))
    assert not legal_names(same, "q", "p", "r", "s")
    assert legal_names(same, "p", "q", "s", "r")
    assert legal_names(apart, "q", "p", "r", "s")
    assert ("p", "q") in must_precede(program("g0"))
    assert ("p", "q") not in must_precede(program("g1"))


def test_effects_keep_their_order_and_nothing_passes_a_barrier() -> None:
    text = """graph g(x: f32[4]) {
      a: f32[4] = extern lib.print.default(%x) effect
      b: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
      c: f32[4] = extern lib.print.default(%x) effect
      d: f32[4] = extern lib.exchange.default(%x) barrier
      e: f32[4] = pointwise (i0: 4) x[i0] + 2.0:f32
      return %a, %b, %c, %d, %e
    }"""
    graph = parse_graph(text)
    assert legal_names(graph, "b", "a", "c", "d", "e")
    assert not legal_names(graph, "c", "b", "a", "d", "e")
    assert not legal_names(graph, "a", "b", "c", "e", "d")
    assert not legal_names(graph, "a", "c", "d", "b", "e")
    assert {("a", "c"), ("c", "d"), ("b", "d"), ("d", "e")} <= must_precede(text)
    assert ("a", "b") not in must_precede(text)


def test_an_order_that_is_no_permutation_is_illegal() -> None:
    graph = parse_graph(OUT_OF_PLACE)
    assert not is_legal(graph, [0, 1, 2])
    assert not is_legal(graph, [0, 1, 2, 2])


@pytest.mark.parametrize("text", [IN_PLACE, OUT_OF_PLACE])
def test_the_orders_that_predecessors_allow_are_exactly_the_legal_ones(text: str) -> None:
    graph = parse_graph(text)
    before = predecessors(graph)
    for order in itertools.permutations(range(len(graph.nodes))):
        position = {node: n for n, node in enumerate(order)}
        allowed = all(position[b] < position[n] for n, bs in enumerate(before) for b in bs)
        assert allowed == is_legal(graph, order), order


def chain(length: int, seed: int) -> Graph:
    """``length`` nodes: pointwise ops on random earlier values, one collective in ten."""
    rng = random.Random(seed)
    i0 = symbol("i0")
    known, nodes = ["x"], list[Node]()
    while len(nodes) < length:
        name = f"t{len(nodes)}"
        value = Value(name, DType.F32, (64,), (1,))
        source = rng.choice(known[-20:])
        if rng.random() < 0.05:
            pending = Pending(f"p{len(nodes)}", (value,), False)
            nodes.append(
                Start(pending=pending, kind=Kind.ALL_REDUCE, group=Group("g0", 2), sources=(source,), reduction="sum")
            )
            nodes.append(Wait(outs=(value,), pending=pending.name))
        else:
            other = ex.load(rng.choice(known[-20:]), (i0,), DType.F32)
            nodes.append(
                Pointwise(out=value, axes=((i0, 64),), expr=ex.op("add", ex.load(source, (i0,), DType.F32), other))
            )
        known.append(name)
    return Graph("g", (Value("x", DType.F32, (64,), (1,)),), tuple(nodes), (Ref(known[-1]),))


def test_ten_thousand_nodes_take_about_a_second() -> None:
    graph = chain(10_000, seed=3)
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        assert is_legal(graph, range(len(graph.nodes)))
        assert len(predecessors(graph)) == len(graph.nodes)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 2.0, f"{min(seconds):.2f} s"


def test_many_collectives_in_flight_take_about_as_long_as_few() -> None:
    """Every second node is a launch that is waited for at the very end."""
    i0, group = symbol("i0"), Group("g0", 2)
    nodes, waits = list[Node](), list[Node]()
    for n in range(3_500):
        made, result = (Value(f"{kind}{n}", DType.F32, (64,), (1,)) for kind in "tr")
        nodes.append(Pointwise(out=made, axes=((i0, 64),), expr=ex.load(f"t{n - 1}" if n else "x", (i0,), DType.F32)))
        pending = Pending(f"p{n}", (result,), False)
        nodes.append(Start(pending=pending, kind=Kind.ALL_REDUCE, group=group, sources=(made.name,), reduction="sum"))
        waits.append(Wait(outs=(result,), pending=pending.name))
    graph = Graph("g", (Value("x", DType.F32, (64,), (1,)),), (*nodes, *waits), (Ref("r9"),))
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        assert is_legal(graph, range(len(graph.nodes)))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 1.5, f"{min(seconds):.2f} s"
