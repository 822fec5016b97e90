from __future__ import annotations

from dcompile.collectives.text import parse_graph
from dcompile.schedule.inline import inline_pointwise
from tests.unit.schedule.passes import apply, assert_same_numbers, context, same


def test_a_chain_collapses_into_its_reduction() -> None:
    before = """
    graph f(x: f32[4, 6], w: f32[6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] * w[i1]
      b: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(a[i0, i1])
      s: f32[4] = reduce sum (i0: 4; r0: 6) b[i0, r0]
      return %s
    }"""
    after = """
    graph f(x: f32[4, 6], w: f32[6]) {
      s: f32[4] = reduce sum (i0: 4; r0: 6) exp(x[i0, r0] * w[r0])
      return %s
    }"""
    assert apply(inline_pointwise, before) == same(after)


def test_a_heavy_value_with_two_readers_is_computed_once() -> None:
    text = """
    graph f(x: f32[4096, 64]) {
      e: f32[4096, 64] = pointwise (i0: 4096, i1: 64) exp(x[i0, i1])
      s: f32[4096] = reduce sum (i0: 4096; r0: 64) e[i0, r0]
      o: f32[4096, 64] = pointwise (i0: 4096, i1: 64) e[i0, i1] * 2.0:f32
      return %s, %o
    }"""
    assert apply(inline_pointwise, text) == same(text)


def test_a_value_a_library_reads_is_not_recomputed_when_it_is_heavy() -> None:
    text = """
    graph f(x: f32[64, 64]) {
      e: f32[64, 64] = pointwise (i0: 64, i1: 64) tanh(x[i0, i1])
      m: f32[64, 64] = extern aten.mm.default(%e, %e) -> aten.mm.out
      o: f32[64, 64] = pointwise (i0: 64, i1: 64) e[i0, i1] + m[i0, i1]
      return %o
    }"""
    assert apply(inline_pointwise, text) == same(text)


def test_nothing_moves_across_a_write_of_what_it_reads() -> None:
    text = """
    graph f(x: f32[8], y: f32[8]) {
      a: f32[8] = pointwise (i0: 8) x[i0] * 2.0:f32
      x1: f32[8] = store set x (i0: 8) [i0] = y[i0]
      b: f32[8] = pointwise (i0: 8) a[i0] + x1[i0]
      return %b
    }"""
    assert apply(inline_pointwise, text) == same(text)
    assert_same_numbers(parse_graph(text), inline_pointwise(parse_graph(text), context()))


def test_a_store_never_overwrites_what_it_will_read() -> None:
    text = """
    graph f(x: f32[8]) {
      a: f32[8] = pointwise (i0: 8) x[-i0 + 7] * 2.0:f32
      x1: f32[8] = store set x (i0: 8) [i0] = a[i0]
      return
    }"""
    assert apply(inline_pointwise, text) == same(text)


def test_a_broadcast_row_statistic_is_not_recomputed_per_element() -> None:
    before = parse_graph(
        """
    graph f(x: f32[512, 512], v: f32[512]) {
      r: f32[512] = pointwise (i0: 512) rsqrt(v[i0] + 1e-05:f32)
      o: f32[512, 512] = pointwise (i0: 512, i1: 512) x[i0, i1] * r[i0]
      return %o
    }"""
    )
    ctx = context()
    after = inline_pointwise(before, ctx)
    assert len(after.nodes) == 2
    assert any(v.subject == "r" and "recomputing" in v.reason for v in ctx.verdicts)


def test_a_gather_inlines_its_index_computation() -> None:
    before = parse_graph(
        """
    graph f(w: f32[16, 4], idx: i64[8]) {
      e: f32[8, 4] = pointwise (i0: 8, i1: 4) w[q0, i1 | q0 = wrap_index(idx[i0], 16:i64)]
      o: f32[8, 4] = pointwise (i0: 8, i1: 4) e[i0, i1] * 2.0:f32
      return %o
    }"""
    )
    after = inline_pointwise(before, context())
    assert len(after.nodes) == 1
    assert_same_numbers(before, after)


def test_a_value_written_through_a_view_is_read_from_memory() -> None:
    text = """
    graph f(x: f32[4]) {
      a: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
      v: f32[2] = view a (i0: 2) -> [i0]
      extern dcompile_rows.bump.default(%v) writes (v) versions (w: f32[2])
      b: f32[4] = pointwise (i0: 4) a[i0] * 2.0:f32
      return %b
    }"""
    assert apply(inline_pointwise, text) == same(text)


def test_what_a_reduction_reads_across_is_recomputed_by_all_its_readers() -> None:
    before = """
    graph f(x: f32[4, 8, 64], m: f32[8], g: f32[4, 8, 64]) {
      d: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) x[i0, i1, i2] - m[i1]
      s: f32[8] = reduce sum (i0: 8; r0: 4, r1: 64) d[r0, i0, r1] * g[r0, i0, r1]
      o: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) d[i0, i1, i2] * s[i1]
      return %s, %o
    }"""
    after = """
    graph f(x: f32[4, 8, 64], m: f32[8], g: f32[4, 8, 64]) {
      s: f32[8] = reduce sum (i0: 8; r0: 4, r1: 64) (x[r0, i0, r1] - m[i0]) * g[r0, i0, r1]
      o: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) (x[i0, i1, i2] - m[i1]) * s[i1]
      return %s, %o
    }"""
    assert apply(inline_pointwise, before) == same(after)


def test_what_a_reduction_reads_across_is_stored_if_recomputing_reads_more() -> None:
    text = """
    graph f(x: f32[4, 8, 64], y: f32[4, 8, 64], z: f32[4, 8, 64]) {
      d: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) x[i0, i1, i2] - y[i0, i1, i2] * z[i0, i1, i2]
      s: f32[8] = reduce sum (i0: 8; r0: 4, r1: 64) d[r0, i0, r1]
      o: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) d[i0, i1, i2] * s[i1]
      return %s, %o
    }"""
    assert apply(inline_pointwise, text) == same(text)


def test_reductions_of_one_shape_count_as_one_reader() -> None:
    before = """
    graph f(r: f32[4, 8, 64], g: f32[4, 8, 64], x: f32[4, 8, 64]) {
      t: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) where(r[i0, i1, i2] <= 0.0:f32, 0.0:f32, g[i0, i1, i2])
      s: f32[8] = reduce sum (i0: 8; r0: 4, r1: 64) t[r0, i0, r1]
      u: f32[8] = reduce sum (i0: 8; r0: 4, r1: 64) t[r0, i0, r1] * x[r0, i0, r1]
      o: f32[4, 8, 64] = pointwise (i0: 4, i1: 8, i2: 64) t[i0, i1, i2] * s[i1] + u[i1]
      return %o
    }"""
    after = inline_pointwise(parse_graph(before).check(), context()).check()
    assert [node.out.name for node in after.nodes] == ["s", "u", "o"]  # type: ignore[attr-defined]
    assert_same_numbers(parse_graph(before), after)
