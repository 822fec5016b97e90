from __future__ import annotations

from dcompile.collectives.text import parse_graph
from dcompile.schedule.simplify import drop_copies, drop_dead, merge_equal, see_through_views, simplify_graph
from tests.unit.schedule.passes import apply, assert_same_numbers, context, same


def test_loads_look_through_chains_of_views() -> None:
    before = """
    graph f(x: f32[4, 6]) {
      t: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
      u: f32[24] = view t (i0: 24) -> [i0 // 4, i0 % 4]
      y: f32[24] = pointwise (i0: 24) exp(u[i0])
      return %y
    }"""
    after = """
    graph f(x: f32[4, 6]) {
      t: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
      u: f32[24] = view x (i0: 24) -> [i0 % 4, i0 // 4]
      y: f32[24] = pointwise (i0: 24) exp(x[i0 % 4, i0 // 4])
      return %y
    }"""
    assert apply(see_through_views, before) == same(after)
    assert_same_numbers(parse_graph(before), simplify_graph(parse_graph(before), context()))


def test_equal_nodes_become_one_but_not_two_outputs() -> None:
    before = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(x[i0])
      c: f32[8] = pointwise (i0: 8) a[i0] + b[i0]
      d: f32[8] = pointwise (i0: 8) b[i0] + b[i0]
      e: f32[8] = pointwise (i0: 8) a[i0] + b[i0]
      return %c, %d, %e
    }"""
    after = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      c: f32[8] = pointwise (i0: 8) a[i0] + a[i0]
      d: f32[8] = pointwise (i0: 8) a[i0] + a[i0]
      e: f32[8] = pointwise (i0: 8) a[i0] + a[i0]
      return %c, %d, %e
    }"""
    assert apply(merge_equal, before) == same(after)


def test_a_value_that_is_written_is_not_merged() -> None:
    text = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(x[i0])
      a1: f32[8] = store set a (i0: 8) [i0] = 1.0:f32
      c: f32[8] = pointwise (i0: 8) a1[i0] + b[i0]
      return %c
    }"""
    assert apply(merge_equal, text) == same(text)


def test_copies_go_unless_returned_or_written() -> None:
    before = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) x[i0]
      b: f32[8] = pointwise (i0: 8) x[i0]
      c: f32[8] = pointwise (i0: 8) x[i0]
      c1: f32[8] = store set c (i0: 8) [i0] = 1.0:f32
      d: f32[8] = pointwise (i0: 8) a[i0] + c1[i0]
      return %b, %d
    }"""
    after = """
    graph f(x: f32[8]) {
      b: f32[8] = pointwise (i0: 8) x[i0]
      c: f32[8] = pointwise (i0: 8) x[i0]
      c1: f32[8] = store set c (i0: 8) [i0] = 1.0:f32
      d: f32[8] = pointwise (i0: 8) x[i0] + c1[i0]
      return %b, %d
    }"""
    assert apply(drop_copies, before) == same(after)


def test_dead_code_goes_and_effects_stay() -> None:
    before = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(a[i0])
      p: pending (r: f32[8]) = start all_reduce.sum (a) @g0[2]
      r: f32[8] = wait p
      return
    }"""
    after = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      p: pending (r: f32[8]) = start all_reduce.sum (a) @g0[2]
      r: f32[8] = wait p
      return
    }"""
    assert apply(drop_dead, before) == same(after)


def test_a_store_that_reads_its_target_elsewhere_is_computed_first() -> None:
    before = parse_graph(
        """
    graph f(x: f32[5, 5]) {
      t: f32[5, 5]{1, 5} = view x (i0: 5, i1: 5) -> [i1, i0]
      x1: f32[5, 5] = store set x (i0: 5, i1: 5) [i0, i1] = t[i0, i1] + x[i0, i1]
      return
    }"""
    )
    after = simplify_graph(before, context())
    assert [type(node).__name__ for node in after.nodes] == ["Pointwise", "Store"]
    assert_same_numbers(before, after)
