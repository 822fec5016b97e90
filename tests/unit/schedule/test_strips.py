"""Reductions of rows and of columns in one kernel: what is read once, what is refused, and equal numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, CostModel
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel, Scratch, statements
from dcompile.options import Options
from dcompile.schedule.fuse import fuse
from dcompile.schedule.stages import split_reductions
from dcompile.schedule.strips import LEAST_ROWS, strips_of
from tests.unit.codegen.triton_cases import BIAS_GRADIENT, NORM_GRADIENT
from tests.unit.schedule.passes import assert_same_numbers


def fused(text: str) -> tuple[Graph, Graph, Context]:
    """Before and after, on a GPU of four multiprocessors."""
    ctx = Context(Options(), CostModel({"cuda": replace(H200, multiprocessors=4)}, {}))
    before = parse_graph(text).check()
    return before, fuse(split_reductions(before, ctx), ctx).check(), ctx


def readers(graph: Graph, name: str) -> int:
    return sum(isinstance(node, Kernel) and name in node.operands for node in graph.nodes)


def has_strips(graph: Graph) -> bool:
    return any(
        isinstance(s, Scratch) and s.name.endswith("_strip")
        for node in graph.nodes
        if isinstance(node, Kernel)
        for s in statements(node.body)
    )


@pytest.mark.row("C8")
def test_gradients_of_a_norm_read_their_inputs_once() -> None:
    before, after, _ = fused(NORM_GRADIENT)
    assert readers(after, "x") == readers(after, "dy") == 1
    assert {out.name for node in after.nodes for out in node.defs}.isdisjoint({"h", "a", "b"})
    assert len(after.nodes) == 1 + 3
    assert_same_numbers(before, after, 2e-5)


def test_a_loop_and_the_sum_of_its_columns_write_what_it_makes_once_and_never_read_it() -> None:
    before, after, _ = fused(BIAS_GRADIENT)
    assert readers(after, "dx") == 0
    assert len(after.nodes) == 2
    assert_same_numbers(before, after, 1e-5)


def test_on_a_cpu_nothing_is_in_strips() -> None:
    assert not has_strips(fused(NORM_GRADIENT.replace("@cuda", ""))[1])


def test_what_needs_the_whole_column_is_another_kernel() -> None:
    text = """
graph f(x: f32[96, 48]@cuda) {
  m: f32[48]@cuda = reduce sum (i0: 48; r0: 96) x[r0, i0]
  y: f32[96, 48]@cuda = pointwise (i0: 96, i1: 48) x[i0, i1] - m[i1]
  return %y
}"""
    before, after, _ = fused(text)
    assert not has_strips(after)
    assert_same_numbers(before, after)


def test_a_library_call_between_row_and_column_keeps_them_apart() -> None:
    text = """
graph f(x: f32[96, 48]@cuda, w: f32[48, 48]@cuda) {
  y: f32[96, 48]@cuda = pointwise (i0: 96, i1: 48) exp(x[i0, i1])
  z: f32[96, 48]@cuda = extern aten.mm.default(%y, %w) -> aten.mm.out
  s: f32[48]@cuda = reduce sum (i0: 48; r0: 96) z[r0, i0] * y[r0, i0]
  return %s
}"""
    assert not has_strips(fused(text)[1])


def test_rows_of_one_matrix_are_not_columns_of_its_transpose() -> None:
    text = """
graph f(x: f32[96, 96]@cuda, z: f32[96, 96]@cuda) {
  y: f32[96, 96]@cuda = pointwise (i0: 96, i1: 96) x[i1, i0] * z[i0, i1]
  s: f32[96]@cuda = reduce sum (i0: 96; r0: 96) x[r0, i0]
  return %y, %s
}"""
    before, after, _ = fused(text)
    assert not has_strips(after)
    assert_same_numbers(before, after, 1e-5)


def test_running_values_that_are_more_bytes_than_the_rows_are_not_worth_it() -> None:
    text = """
graph f(x: bool[64, 48]@cuda) {
  y: bool[64, 48]@cuda = pointwise (i0: 64, i1: 48) not(x[i0, i1])
  s: i64[48]@cuda = reduce sum (i0: 48; r0: 64) to_i64(x[r0, i0])
  return %y, %s
}"""
    _, after, ctx = fused(text)
    assert not has_strips(after)
    assert any(v.decision == "not in strips" for v in ctx.verdicts)


def test_strips_divide_the_rows() -> None:
    assert strips_of(65536, 4096, 132) == 512
    assert strips_of(65536, 64, 132) == 2048
    assert strips_of(64 * 197, 768, 132) == 394
    assert strips_of(8192, 768, 132) == 512
    assert strips_of(65537, 4096, 132) is None
    assert strips_of(132 * (LEAST_ROWS - 1), 4096, 132) is None
