"""Maximum and sum of exponentials of long rows: read once, and equal to the two passes for every special value."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, CostModel
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.softmax import chunks_of
from dcompile.schedule.stages import split_reductions

ROWS, LONG = 7, 20480

TEXT = """
graph f(x: bf16[7, 20480]@cuda) {
  m: f32[7, 1]@cuda = reduce max (i0: 7, i1: 1; r0: 20480) to_f32(x[i0, r0])
  s: f32[7, 1]@cuda = reduce sum (i0: 7, i1: 1; r0: 20480) exp(to_f32(x[i0, r0]) - m[i0, 0])
  l: f32[7, 1]@cuda = pointwise (i0: 7, i1: 1) log(s[i0, 0])
  return %m, %l
}"""


def fused(text: str) -> tuple[Graph, Graph]:
    """On a GPU of one multiprocessor, so that nothing else cuts rows."""
    ctx = Context(Options(), CostModel({"cuda": replace(H200, multiprocessors=1)}, {}))
    before = parse_graph(text).check()
    return before, fuse(split_reductions(before, ctx), ctx).check()


def readers(graph: Graph) -> int:
    return sum(isinstance(node, Kernel) and "x" in node.operands for node in graph.nodes)


def rows() -> torch.Tensor:
    """Random, and rows with nothing but -inf, with -inf in whole chunks, with inf, with NaN."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, LONG) * 4
    x[1] = -math.inf
    x[2, :10000] = -math.inf
    x[3, 5] = math.inf
    x[4, 9000] = math.nan
    x[5] = 300.0
    x[6, 1:] = -math.inf
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("length", [LONG, LONG - 1])
def test_rows_are_read_once_and_the_results_are_those_of_two_passes(length: int) -> None:
    before, after = fused(TEXT.replace(str(LONG), str(length)))
    (kernel,) = (node for node in after.nodes if isinstance(node, Kernel) and "x" in node.operands)
    assert {out.name for out in kernel.outs} == {"m_part", "s_part"}
    assert len(after.nodes) == 2
    wanted, found = (run_reference([graph], [[rows()[:, :length].contiguous()]])[0] for graph in (before, after))
    for a, b in zip(found, wanted, strict=True):
        assert isinstance(a, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("@cuda", ""),
        TEXT.replace("20480", "4096"),
        TEXT.replace("- m[i0, 0]", "* m[i0, 0]"),
        TEXT.replace("exp(to_f32(x[i0, r0])", "exp(2.0:f32 * to_f32(x[i0, r0])"),
    ],
    ids=["cpu", "short", "no difference", "other elements"],
)
def test_other_reductions_are_left_alone(text: str) -> None:
    after = fused(text)[1]
    assert not any(out.name == "s_part" for node in after.nodes for out in node.defs)


def test_chunks_fill_their_blocks() -> None:
    assert chunks_of(131072) == 32
    assert chunks_of(50304) == 16
    assert chunks_of(16384) is None
    assert chunks_of(30522) == 8


def test_a_sum_with_one_hit_is_closed_before_it_would_be_cut() -> None:
    text = """
graph f(label: i64[6]@cuda, s: f32[6]@cuda) {
  t: f32[6]@cuda = reduce sum (i0: 6; r0: 131072) where(index(r0) == label[i0], s[i0], 0.0:f32)
  return %t
}"""
    after = fused(text)[1]
    assert [out.name for node in after.nodes for out in node.defs] == ["t"]
    labels, scale = torch.tensor([0, 131071, 131072, -1, 7, 99]), torch.randn(6)
    (found,) = run_reference([after], [[labels, scale]])[0]
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, scale * torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
