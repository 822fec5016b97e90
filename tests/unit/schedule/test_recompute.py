"""Row values that a later pass needs again: kept, stored or evaluated again."""

from __future__ import annotations

import pytest

from dcompile.collectives.text import parse_graph
from dcompile.ir.kernel import Kernel
from dcompile.schedule.emit import SCRATCH_BYTES
from dcompile.schedule.fuse import fuse
from tests.unit.schedule.passes import context

LONG = SCRATCH_BYTES // 4 + 8
"""Elements of a row that scratch has no place for."""


def outs(device: str, expr: str, inputs: str = "") -> list[str]:
    """What the one kernel of a row normalisation writes."""
    graph = parse_graph(f"""
graph f(x: f32[4, {LONG}]{device}{inputs}) {{
  e: f32[4, {LONG}]{device} = pointwise (i0: 4, i1: {LONG}) {expr}
  s: f32[4]{device} = reduce sum (i0: 4; r0: {LONG}) e[i0, r0]
  y: f32[4, {LONG}]{device} = pointwise (i0: 4, i1: {LONG}) e[i0, i1] / s[i0]
  return %y
}}""").check()
    (kernel,) = (node for node in fuse(graph, context()).nodes if isinstance(node, Kernel))
    return [out.name for out in kernel.outs]


def test_a_gpu_evaluates_long_rows_again() -> None:
    assert outs("@cuda", "exp(exp(x[i0, i1]))") == ["y"]


def test_a_cpu_stores_them() -> None:
    assert outs("", "exp(exp(x[i0, i1]))") == ["e", "y"]


@pytest.mark.parametrize(
    "expr", ["x[i0, i1] * a[i0, i1] * b[i0, i1] * exp(c[i0, i1])", "exp(" * 8 + "x[i0, i1]" + ")" * 8]
)
def test_a_gpu_stores_what_costs_more_to_read_or_to_evaluate(expr: str) -> None:
    inputs = "".join(f", {name}: f32[4, {LONG}]@cuda" for name in "abc")
    assert "e" in outs("@cuda", expr, inputs)
