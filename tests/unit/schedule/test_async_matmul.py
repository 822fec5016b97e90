"""Collectives and the products beside them in parts: texts before and after, numbers on several ranks, the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcompile.analyse.context import Context
from dcompile.analyse.cost import DEFAULT_LINK, CostModel
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Pack
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.async_matmul import async_matmuls
from dcompile.schedule.bucket import scheduled_us
from dcompile.schedule.cut_product import cut
from dcompile.schedule.product_sites import product_sites
from tests.strategies import assert_same, copy_inputs, random_inputs


def cut_in(text: str, parts: int, ranks: int = 2) -> Graph:
    """``text`` with everything cut that can be, checked on all ranks against the reference interpreter."""
    before = parse_graph(text).check()
    after = cut(before, list(product_sites(before)), parts).check()
    inputs = random_inputs(before, ranks)
    first, second = copy_inputs(inputs), copy_inputs(inputs)
    assert_same(run_reference([after] * ranks, second), run_reference([before] * ranks, first))
    return after


def same(text: str) -> str:
    return print_graph(parse_graph(text))


BATCH_FIRST = """
graph f(x: f32[4, 3, 8], w: f32[8, 5], v: f32[8, 6], b: f32[6]) {
  p: pending (r: f32[8, 3, 8]) = start all_gather (x) @g0[2]
  r: f32[8, 3, 8] = wait p
  c: f32[4, 2, 3, 8] = pointwise (i0: 4, i1: 2, i2: 3, i3: 8) r[i0 + 4*i1, i2, i3]
  a: f32[24, 8] = view c (i0: 24, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
  y: f32[24, 5] = extern aten.mm.default(%a, %w) -> aten.mm.out
  z: f32[24, 6] = extern aten.addmm.default(%b, %a, %v) -> aten.addmm.out
  return %y, %z, %a
}"""


def test_a_gather_in_front_of_several_products_copies_nothing_new() -> None:
    assert print_graph(cut_in(BATCH_FIRST, 2)) == same("""
    graph f(x: f32[4, 3, 8], w: f32[8, 5], v: f32[8, 6], b: f32[6]) {
      x_p_part0: f32[2, 3, 8] = view x (i0: 2, i1: 3, i2: 8) -> [i0, i1, i2]
      x_p_part1: f32[2, 3, 8] = view x (i0: 2, i1: 3, i2: 8) -> [i0 + 2, i1, i2]
      r_arrived0_flight: pending (r_arrived0: f32[4, 3, 8]) = start all_gather (x_p_part0) @g0[2]
      r_arrived1_flight: pending (r_arrived1: f32[4, 3, 8]) = start all_gather (x_p_part1) @g0[2]
      r_arrived0: f32[4, 3, 8] = wait r_arrived0_flight
      c_part0: f32[2, 2, 3, 8] = pointwise (i0: 2, i1: 2, i2: 3, i3: 8) r_arrived0[i0 + 2*i1, i2, i3]
      r_arrived1: f32[4, 3, 8] = wait r_arrived1_flight
      c_part1: f32[2, 2, 3, 8] = pointwise (i0: 2, i1: 2, i2: 3, i3: 8) r_arrived1[i0 + 2*i1, i2, i3]
      c_parts: f32[192] = pack (c_part0, c_part1)
      c: f32[4, 2, 3, 8] = view c_parts (i0: 4, i1: 2, i2: 3, i3: 8) -> [48*i0 + 24*i1 + 8*i2 + i3]
      a: f32[24, 8] = view c (i0: 24, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
      y_factor0: f32[12, 8] = view c_part0 (i0: 12, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
      y_part0: f32[12, 5] = extern aten.mm.default(%y_factor0, %w) -> aten.mm.out
      y_factor1: f32[12, 8] = view c_part1 (i0: 12, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
      y_part1: f32[12, 5] = extern aten.mm.default(%y_factor1, %w) -> aten.mm.out
      y_parts: f32[120] = pack (y_part0, y_part1)
      y: f32[24, 5] = view y_parts (i0: 24, i1: 5) -> [5*i0 + i1]
      z_factor0: f32[12, 8] = view c_part0 (i0: 12, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
      z_part0: f32[12, 6] = extern aten.addmm.default(%b, %z_factor0, %v) -> aten.addmm.out
      z_factor1: f32[12, 8] = view c_part1 (i0: 12, i1: 8) -> [i0 // 6, (i0 // 3) % 2, i0 % 3, i1]
      z_part1: f32[12, 6] = extern aten.addmm.default(%b, %z_factor1, %v) -> aten.addmm.out
      z_parts: f32[144] = pack (z_part0, z_part1)
      z: f32[24, 6] = view z_parts (i0: 24, i1: 6) -> [6*i0 + i1]
      return %y, %z, %a
    }""")


SCATTERED = """
graph f(x: f32[24, 8], w: f32[8, 5]) {
  y: f32[24, 5] = extern aten.mm.default(%x, %w) -> aten.mm.out
  s: f32[2, 4, 3, 5] = pointwise (i0: 2, i1: 4, i2: 3, i3: 5) y[3*i0 + 6*i1 + i2, i3]
  t: f32[8, 3, 5] = view s (i0: 8, i1: 3, i2: 5) -> [i0 // 4, i0 % 4, i1, i2]
  p: pending (r: f32[4, 3, 5]) = start reduce_scatter.sum (t) @g0[2]
  r: f32[4, 3, 5] = wait p
  return %r
}"""


def test_a_product_in_front_of_a_reduction_copies_nothing_new() -> None:
    assert print_graph(cut_in(SCATTERED, 2)) == same("""
    graph f(x: f32[24, 8], w: f32[8, 5]) {
      x_y_part0: f32[12, 8] = view x (i0: 12, i1: 8) -> [i0, i1]
      y_part0: f32[12, 5] = extern aten.mm.default(%x_y_part0, %w) -> aten.mm.out
      p_sent0: f32[4, 3, 5] = pointwise (i0: 4, i1: 3, i2: 5) y_part0[3*(i0 // 2) + 6*(i0 % 2) + i1, i2]
      r_reduced0_flight: pending (r_reduced0: f32[2, 3, 5]) = start reduce_scatter.sum (p_sent0) @g0[2]
      x_y_part1: f32[12, 8] = view x (i0: 12, i1: 8) -> [i0 + 12, i1]
      y_part1: f32[12, 5] = extern aten.mm.default(%x_y_part1, %w) -> aten.mm.out
      p_sent1: f32[4, 3, 5] = pointwise (i0: 4, i1: 3, i2: 5) y_part1[3*(i0 // 2) + 6*(i0 % 2) + i1, i2]
      r_reduced1_flight: pending (r_reduced1: f32[2, 3, 5]) = start reduce_scatter.sum (p_sent1) @g0[2]
      r_reduced0: f32[2, 3, 5] = wait r_reduced0_flight
      r_reduced1: f32[2, 3, 5] = wait r_reduced1_flight
      r_parts: f32[60] = pack (r_reduced0, r_reduced1)
      r: f32[4, 3, 5] = view r_parts (i0: 4, i1: 3, i2: 5) -> [15*i0 + 5*i1 + i2]
      return %r
    }""")


def sequence_first(ranks: int) -> str:
    """Gathered and scattered along the first dimension of matrices, as for activations with the sequence in front."""
    return f"""
    graph f(x: f32[4, 8], w: f32[8, 6], v: f32[6, 8]) {{
      p: pending (r: f32[{4 * ranks}, 8]) = start all_gather (x) @g0[{ranks}]
      r: f32[{4 * ranks}, 8] = wait p
      y: f32[{4 * ranks}, 6] = extern aten.mm.default(%r, %w) -> aten.mm.out
      h: f32[{4 * ranks}, 6] = pointwise (i0: {4 * ranks}, i1: 6) tanh(y[i0, i1])
      z: f32[{4 * ranks}, 8] = extern aten.mm.default(%h, %v) -> aten.mm.out
      q: pending (s: f32[4, 8]) = start reduce_scatter.sum (z) @g0[{ranks}]
      s: f32[4, 8] = wait q
      return %s, %r
    }}"""


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("parts", [2, 4])
def test_rows_of_every_rank_are_cut_where_the_first_dimension_is_gathered(ranks: int, parts: int) -> None:
    after = cut_in(sequence_first(ranks), parts, ranks)
    assert sum(isinstance(node, Start) for node in after.nodes) == 2 * parts
    assert sum(isinstance(node, Extern) for node in after.nodes) == 2 * parts


@pytest.mark.parametrize("parts", [2, 4])
def test_batch_first_in_more_parts(parts: int) -> None:
    after = cut_in(BATCH_FIRST, parts)
    assert sum(isinstance(node, Start) for node in after.nodes) == parts
    assert sum(isinstance(node, Start) for node in cut_in(SCATTERED, parts).nodes) == parts


BATCHED = """
graph f(x: f32[4, 3, 8], w: f32[4, 8, 5]) {
  p: pending (r: f32[8, 3, 8]) = start all_gather (x) @g0[2]
  r: f32[8, 3, 8] = wait p
  c: f32[4, 2, 3, 8] = pointwise (i0: 4, i1: 2, i2: 3, i3: 8) r[i0 + 4*i1, i2, i3]
  a: f32[4, 6, 8] = view c (i0: 4, i1: 6, i2: 8) -> [i0, i1 // 3, i1 % 3, i2]
  y: f32[4, 6, 5] = extern aten.bmm.default(%a, %w) -> aten.bmm.out
  z: f32[4, 6, 5] = pointwise (i0: 4, i1: 6, i2: 5) tanh(y[i0, i1, i2])
  k: f32[4, 6, 8] = extern aten.bmm.default(%z, %u) -> aten.bmm.out
  s: f32[2, 4, 3, 8] = pointwise (i0: 2, i1: 4, i2: 3, i3: 8) k[i1, 3*i0 + i2, i3]
  t: f32[8, 3, 8] = view s (i0: 8, i1: 3, i2: 8) -> [i0 // 4, i0 % 4, i1, i2]
  q: pending (o: f32[4, 3, 8]) = start reduce_scatter.avg (t) @g0[2]
  o: f32[4, 3, 8] = wait q
  return %o
}""".replace("w: f32[4, 8, 5])", "w: f32[4, 8, 5], u: f32[4, 5, 8])")


SUMMED = {
    "batch first": """
graph f(x: f32[24, 8], w: f32[8, 5], u: f32[24, 3], v: f32[3, 5]) {
  y: f32[24, 5] = extern aten.mm.default(%x, %w) -> aten.mm.out
  s: f32[2, 4, 3, 5] = pointwise (i0: 2, i1: 4, i2: 3, i3: 5) y[3*i0 + 6*i1 + i2, i3]
  z: f32[24, 5] = extern aten.mm.default(%u, %v) -> aten.mm.out
  a: f32[8, 3, 5] = pointwise (i0: 8, i1: 3, i2: 5) s[i0 // 4, i0 % 4, i1, i2] + z[3*(i0 // 4) + 6*(i0 % 4) + i1, i2]
  p: pending (r: f32[4, 3, 5]) = start reduce_scatter.sum (a) @g0[2]
  r: f32[4, 3, 5] = wait p
  return %r, %z
}""",
    "sequence first": """
graph f(x: f32[8, 8], w: f32[8, 5], u: f32[8, 3], v: f32[3, 5]) {
  y: f32[8, 5] = extern aten.mm.default(%x, %w) -> aten.mm.out
  z: f32[8, 5] = extern aten.mm.default(%u, %v) -> aten.mm.out
  a: f32[8, 5] = pointwise (i0: 8, i1: 5) y[i0, i1] + z[i0, i1]
  p: pending (r: f32[4, 5]) = start reduce_scatter.sum (a) @g0[2]
  r: f32[4, 5] = wait p
  return %r, %z
}""",
}


@pytest.mark.parametrize("text", SUMMED.values(), ids=SUMMED)
@pytest.mark.parametrize("parts", [2, 4])
def test_sums_of_products_are_cut_together(text: str, parts: int) -> None:
    after = cut_in(text, parts)
    assert sum(isinstance(node, Extern) for node in after.nodes) == 2 * parts
    assert sum(isinstance(node, Start) for node in after.nodes) == parts


def test_other_readers_of_the_gathered_tensor_get_it_whole() -> None:
    text = BATCH_FIRST.replace("  a: f32", "  o: f32[8] = reduce sum (i0: 8; r0: 8, r1: 3) r[r0, r1, i0]\n  a: f32", 1)
    after = cut_in(text.replace("return %y", "return %o, %y"), 2)
    assert sum(isinstance(node, Start) for node in after.nodes) == 2


def test_rows_seen_through_other_digits_are_recognised() -> None:
    text = BATCH_FIRST.replace("(i0 // 3) % 2", "(i0 % 6) // 3")
    assert sum(isinstance(node, Start) for node in cut_in(text, 2).nodes) == 2


def test_batched_products_are_cut_by_batches() -> None:
    after = cut_in(BATCHED, 2)
    assert sum(isinstance(node, Extern) for node in after.nodes) == 4
    assert sum(isinstance(node, Start) for node in after.nodes) == 4


@pytest.mark.parametrize(
    "text",
    [
        BATCH_FIRST.replace("%a, %w", "%w2, %w").replace("w: f32[8, 5]", "w: f32[8, 5], w2: f32[24, 8]"),
        SCATTERED.replace("y[3*i0", "x[3*i0").replace("f32[8, 5]", "f32[8, 8]"),
    ],
    ids=["another first factor", "no product"],
)
def test_other_programs_keep_their_numbers(text: str) -> None:
    if "w2" in text:
        cut_in(text, 2)
    else:
        assert not list(product_sites(parse_graph(text)))


def test_three_parts_do_not_divide_four_rows() -> None:
    before = parse_graph(SCATTERED)
    assert cut(before, list(product_sites(before)), 3) is before


LARGE = """
graph f(x: bf16[8, 1024, 4096] @cuda, w: bf16[4096, 5504] @cuda) {
  p: pending (r: bf16[16, 1024, 4096] @cuda) = start all_gather (x) @g0[2]
  r: bf16[16, 1024, 4096] @cuda = wait p
  c: bf16[8, 2, 1024, 4096] @cuda = pointwise (i0: 8, i1: 2, i2: 1024, i3: 4096) r[i0 + 8*i1, i2, i3]
  a: bf16[16384, 4096] @cuda = view c (i0: 16384, i1: 4096) -> [i0 // 2048, (i0 // 1024) % 2, i0 % 1024, i1]
  y: bf16[16384, 5504] @cuda = extern aten.mm.default(%a, %w) -> aten.mm.out
  return %y
}"""


def on_gpus(contention: float) -> Context:
    costs = CostModel.analytical("cuda", 2)
    link = replace(costs.links[DEFAULT_LINK], contention=contention)
    return Context(Options(cache_dir=None), replace(costs, links={DEFAULT_LINK: link}))


def test_large_products_are_cut_and_predicted_faster() -> None:
    ctx, before = on_gpus(0.2), parse_graph(LARGE)
    after = async_matmuls(before, ctx)
    assert any(isinstance(node, Pack) for node in after.nodes)
    assert scheduled_us(after, ctx) < scheduled_us(before, ctx)
    assert [v.decision for v in ctx.verdicts if v.stage == "async_matmul"].count("taken") == 1


def test_what_hides_nothing_or_is_small_stays_whole() -> None:
    before = parse_graph(LARGE)
    assert async_matmuls(before, on_gpus(1.0)) is before
    small = parse_graph(BATCH_FIRST)
    assert async_matmuls(small, Context(Options(cache_dir=None), CostModel.analytical("cpu", 2))) is small
