"""Sums over ranks taken where the summands arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, NCCL_NVLINK, NVLINK_PEERS, CostModel
from dcompile.collectives.nodes import Via
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.exchange import exchange_sums


def nvlink(peers: bool = False) -> Context:
    link = replace(NCCL_NVLINK, others={Via.PEERS: NVLINK_PEERS} if peers else {})
    costs = CostModel({"cpu": H200}, {"*": link})
    return Context(Options.from_env({"cache_dir": None}), costs)


def run(text: str, peers: bool = False) -> tuple[Graph, Graph, Context]:
    ctx = nvlink(peers)
    before = parse_graph(text).check()
    return before, exchange_sums(before, ctx).check(), ctx


ALL_REDUCE = """\
graph backward(x: bf16[4, 6]) {
  wide: f32[4, 6] = pointwise (i0: 4, i1: 6) to_f32(x[i0, i1])
  scaled: f32[4, 6] = pointwise (a: 4, b: 6) wide[a, b] * 0.5:f32
  p: pending (sum: f32[4, 6]) = start all_reduce.sum (scaled) @g0[2]
  sum: f32[4, 6] = wait p
  return %sum
}
"""


def test_an_all_reduce_of_converted_numbers_gathers_them_before_they_are_converted() -> None:
    _, after, _ = run(ALL_REDUCE)
    assert (
        print_graph(after)
        == """\
graph backward(x: bf16[4, 6]) {
  sum_summands_flight: pending (sum_summands: bf16[8, 6]) = start all_gather (x) @g0[2]
  sum_summands: bf16[8, 6] = wait sum_summands_flight
  sum: f32[4, 6] = pointwise (i0: 4, i1: 6) SUM
  return %sum
}
""".replace("SUM", "to_f32(sum_summands[i0, i1]) * 0.5:f32 + to_f32(sum_summands[i0 + 4, i1]) * 0.5:f32")
    )


REDUCE_SCATTER = """\
graph backward(x: bf16[6, 2]) {
  wide: f32[6, 2] = pointwise (i0: 6, i1: 2) to_f32(x[i0, i1])
  p: pending (sum: f32[RANK_ROWS, 2]) = start reduce_scatter.avg (wide) @g0[RANKS]
  sum: f32[RANK_ROWS, 2] = wait p
  return %sum
}
"""


AVERAGE = ALL_REDUCE.replace("all_reduce.sum", "all_reduce.avg")


@pytest.mark.parametrize(("text", "ranks"), [(ALL_REDUCE, 2), (AVERAGE, 2), (REDUCE_SCATTER, 2), (REDUCE_SCATTER, 3)])
def test_the_numbers_are_the_same(text: str, ranks: int) -> None:
    text = text.replace("@g0[2]", f"@g0[{ranks}]").replace("RANKS", str(ranks)).replace("RANK_ROWS", str(6 // ranks))
    before, after, _ = run(text)
    assert "bf16" in print_graph(after).split(" = start ")[0].rsplit("pending", 1)[1]
    generator = torch.Generator().manual_seed(ranks)
    shape = before.value("x").shape
    inputs = [[torch.randn(*shape, generator=generator).bfloat16()] for _ in range(ranks)]
    outputs = [run_reference([g] * ranks, [list(one) for one in inputs]) for g in (before, after)]
    for (wide,), (narrow,) in zip(*outputs, strict=True):
        if ranks == 2:
            assert torch.equal(wide, narrow)
        torch.testing.assert_close(wide, narrow)


@pytest.mark.parametrize(
    ("old", "new"),
    {
        "another order of elements": ("x[i0, i1]", "x[3 - i0, i1]"),
        "two tensors": ("wide[a, b] * 0.5:f32", "wide[a, b] * y[a, b]"),
        "the position itself": ("wide[a, b] * 0.5:f32", "wide[a, b] * to_f32(index(a))"),
        "no sum": ("all_reduce.sum", "all_reduce.max"),
        "wide from the start": ("x: bf16[4, 6]", "x: f32[4, 6]"),
        "not contiguous": ("x: bf16[4, 6]", "x: bf16[4, 6] {1, 4}"),
    }.values(),
)
def test_what_does_not_follow_from_narrower_numbers_stays(old: str, new: str) -> None:
    text = ALL_REDUCE.replace("(x:", "(y: f32[4, 6], x:").replace("4, 6])", "4, 6])")
    assert old in text
    text = text.replace(old, new)
    if "f32[4, 6]) {" in text:
        text = text.replace("to_f32(x", "(x")
    before, after, _ = run(text)
    assert after is before


def test_a_source_that_is_overwritten_before_the_launch_stays() -> None:
    text = ALL_REDUCE.replace(
        "  p: pending", "  x1: bf16[4, 6] = store set x (i0: 4, i1: 6) [i0, i1] = 0.0:bf16\n  p: pending"
    )
    before, after, ctx = run(text)
    assert after is before
    assert "overwritten" in ctx.verdicts[0].reason


def test_many_ranks_reduce_because_gathering_would_send_more() -> None:
    before, after, ctx = run(ALL_REDUCE.replace("@g0[2]", "@g0[8]"))
    assert after is before
    assert ctx.verdicts[0].decision == "reduced"


LOW = """\
graph backward(x: bf16[6, 2]) {
  p: pending (sum: bf16[3, 2]) = start reduce_scatter.avg (x) @g0[2]
  sum: bf16[3, 2] = wait p
  return %sum
}
"""


def test_a_reduce_scatter_is_an_exchange_where_copy_engines_carry_it() -> None:
    before, after, _ = run(LOW)
    assert after is before
    _, after, ctx = run(LOW, peers=True)
    assert "start all_to_all (x)" in print_graph(after)
    total = "(to_f32(sum_summands[i0, i1]) + to_f32(sum_summands[i0 + 3, i1])) / 2.0:f32"
    assert f"to_bf16({total})" in print_graph(after)
    assert ctx.verdicts[0].decision == "exchanged"
    inputs = [[torch.randn(6, 2, generator=torch.Generator().manual_seed(r)).bfloat16()] for r in range(2)]
    outputs = [run_reference([g] * 2, [list(one) for one in inputs]) for g in (before, after)]
    for (reduced,), (exchanged,) in zip(*outputs, strict=True):
        torch.testing.assert_close(reduced, exchanged)
