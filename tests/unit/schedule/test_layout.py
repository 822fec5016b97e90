from __future__ import annotations

from dcompile.collectives.text import parse_graph
from dcompile.schedule.layout import choose_layouts, dense_stride
from tests.unit.schedule.passes import apply, assert_same_numbers, context, same


def test_a_free_value_is_stored_in_the_order_of_its_largest_input() -> None:
    before = """
    graph f(x: f32[4, 6]{1, 4}, w: f32[6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1] * w[i1])
      s: f32[6] = reduce sum (i0: 6; r0: 4) a[r0, i0]
      return %s
    }"""
    after = before.replace("a: f32[4, 6] =", "a: f32[4, 6]{1, 4} =")
    assert apply(choose_layouts, before) == same(after)
    assert_same_numbers(parse_graph(before), choose_layouts(parse_graph(before), context()))


def test_readers_have_a_say_by_their_bytes() -> None:
    text = """
    graph f(x: f32[4, 6], y: f32[4, 6]{1, 4}, z: f32[6, 4]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])
      b: f32[6, 4] = pointwise (i0: 6, i1: 4) a[i1, i0] * z[i0, i1]
      return %b
    }"""
    after = text.replace("a: f32[4, 6] =", "a: f32[4, 6]{1, 4} =")  # z and b against x
    assert apply(choose_layouts, text) == same(after)
    assert_same_numbers(parse_graph(text), choose_layouts(parse_graph(text), context()))
    tie = """
    graph f(x: f32[4, 6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])
      b: f32[6, 4] = pointwise (i0: 6, i1: 4) a[i1, i0] * 2.0:f32
      return %b
    }"""
    assert apply(choose_layouts, tie) == same(tie)


def test_what_others_see_keeps_eagers_layout() -> None:
    text = """
    graph f(x: f32[4, 6]{1, 4}, p: f32[4, 6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])
      b: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] + 1.0:f32
      m: f32[4, 4] = extern aten.mm.default(%b, %b) -> aten.mm.out
      c: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] + 2.0:f32
      c1: f32[4, 6] = store set c (i0: 4, i1: 6) [i0, i1] = p[i0, i1]
      return %a
    }"""
    assert apply(choose_layouts, text) == same(text)


def test_broadcast_inputs_do_not_decide() -> None:
    text = """
    graph f(w: f32[6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(w[i1])
      s: f32[6] = reduce sum (i0: 6; r0: 4) a[r0, i0]
      return %s
    }"""
    assert apply(choose_layouts, text) == same(text)


def test_dense_strides_follow_the_order_and_treat_empty_dimensions_as_eager_does() -> None:
    assert dense_stride((2, 3, 4), (0, 2, 1)) == (12, 1, 3)
    assert dense_stride((2, 0, 3), (0, 1, 2)) == (3, 3, 1)
