from __future__ import annotations

import pytest

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


WRITE_VIEW = "extern aten.mul_.Tensor(%{0}, 2.0) writes ({0}) versions ({0}_new: f32[4])"


@pytest.mark.parametrize("written", ["x", "y"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_copy_stays_if_either_side_is_written_through_a_view(written: str, levels: int) -> None:
    views = [f"v: f32[4] = view {written} (i0: 4) -> [i0 + 2]", "u: f32[4] = view v (i0: 4) -> [i0]"][:levels]
    text = f"""
    graph f(x: f32[8]) {{
      y: f32[8] = pointwise (i0: 8) x[i0]
      {chr(10).join(views)}
      {WRITE_VIEW.format("vu"[levels - 1])}
      z: f32[8] = pointwise (i0: 8) x[i0] - y[i0]
      return %z
    }}"""
    assert apply(drop_copies, text) == same(text)
    assert_same_numbers(parse_graph(text), simplify_graph(parse_graph(text), context()))


def test_a_copy_goes_if_the_original_was_written_before_it() -> None:
    before = """
    graph f(x: f32[8]) {
      x1: f32[8] = store set x (i0: 4) [i0] = 1.0:f32
      y: f32[8] = pointwise (i0: 8) x1[i0]
      z: f32[8] = pointwise (i0: 8) exp(y[i0])
      return %z
    }"""
    after = before.replace("y: f32[8] = pointwise (i0: 8) x1[i0]", "").replace("y[", "x1[")
    assert apply(drop_copies, before) == same(after)
    assert_same_numbers(parse_graph(before), parse_graph(after))


def test_a_copy_stays_if_a_view_of_it_is_returned() -> None:
    text = """
    graph f(x: f32[8]) {
      y: f32[8] = pointwise (i0: 8) x[i0]
      v: f32[4] = view y (i0: 4) -> [i0]
      return %v
    }"""
    assert apply(drop_copies, text) == same(text)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_value_that_is_written_through_views_is_not_merged(levels: int) -> None:
    views = ["v: f32[4] = view b (i0: 4) -> [i0 + 2]", "u: f32[4] = view v (i0: 4) -> [i0]"][:levels]
    text = f"""
    graph f(x: f32[8]) {{
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(x[i0])
      {chr(10).join(views)}
      {WRITE_VIEW.format("vu"[levels - 1])}
      z: f32[8] = pointwise (i0: 8) a[i0] - b[i0]
      return %z
    }}"""
    assert apply(merge_equal, text) == same(text)
    assert_same_numbers(parse_graph(text), simplify_graph(parse_graph(text), context()))


def test_what_is_computed_before_and_after_a_write_through_a_view_is_not_merged() -> None:
    text = f"""
    graph f(x: f32[8]) {{
      v: f32[4] = view x (i0: 4) -> [i0 + 2]
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      {WRITE_VIEW.format("v")}
      b: f32[8] = pointwise (i0: 8) exp(x[i0])
      z: f32[8] = pointwise (i0: 8) a[i0] - b[i0]
      return %z
    }}"""
    assert apply(merge_equal, text) == same(text)
    assert_same_numbers(parse_graph(text), simplify_graph(parse_graph(text), context()))


def test_two_returned_views_of_equal_values_keep_their_own_memory() -> None:
    text = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(x[i0])
      v: f32[4] = view a (i0: 4) -> [i0]
      w: f32[4] = view b (i0: 4) -> [i0]
      return %v, %w
    }"""
    assert apply(merge_equal, text) == same(text)


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
