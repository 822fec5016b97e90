"""Which collectives copy engines carry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, NCCL_NVLINK, NVLINK_PEERS, CostModel
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.nodes import Start, Via
from dcompile.collectives.rules import check
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph
from dcompile.options import Options
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.lowering import choose_lowerings
from dcompile.schedule.memory import plan_memory

BEFORE = """\
graph forward(x: f32[4, 6] @cuda, y: f32[4, 6] @cuda, z: f32[4, 6] @cuda) {
  p: pending (a: f32[8, 6] @cuda) = start all_gather (x) @g0[2]
  q: pending (b: f32[8, 6] @cuda) = start all_gather (y) @g0[2]
  r: pending (c: f32[4, 6] @cuda) = start all_reduce.sum (z) @g0[2]
  a: f32[8, 6] @cuda = wait p
  b: f32[8, 6] @cuda = wait q
  c: f32[4, 6] @cuda = wait r
  d: f32[8, 6] @cuda = pointwise (i0: 8, i1: 6) a[i0, i1] + b[i0, i1]
  return %c, %d
}
"""


def context(peers: LinkModel | None = NVLINK_PEERS) -> Context:
    others = {} if peers is None else {Via.PEERS: peers}
    costs = CostModel({"cuda": H200}, {"*": replace(NCCL_NVLINK, others=others)})
    return Context(Options.from_env({"cache_dir": None}), costs)


def vias(graph: Graph) -> dict[str, str]:
    return {node.pending.name: node.via.value for node in graph.nodes if isinstance(node, Start)}


def chosen(text: str, ctx: Context) -> dict[str, str]:
    return vias(choose_lowerings(parse_graph(text).check(), ctx).check())


def test_gathers_go_by_copies_where_these_are_cheaper() -> None:
    after = choose_lowerings(parse_graph(BEFORE).check(), context()).check()
    assert vias(after) == {"p": "peers", "q": "peers", "r": "library"}
    assert print_graph(parse_graph(print_graph(after))) == print_graph(after)
    assert "@g0[2] via peers" in print_graph(after)


@pytest.mark.parametrize(
    ("contention", "bytes_per_us", "via"), [(0.25, 369e3, "peers"), (0.25, 150e3, "library"), (0.9, 280e3, "library")]
)
def test_the_price_decides(contention: float, bytes_per_us: float, via: str) -> None:
    ctx = context(replace(NVLINK_PEERS, contention=contention, bytes_per_us=bytes_per_us))
    assert chosen(BEFORE, ctx)["p"] == via
    assert [v.decision for v in ctx.verdicts if v.subject == "p"] == [f"via {via}"]


def test_without_peers_nothing_changes() -> None:
    graph = parse_graph(BEFORE).check()
    ctx = context(None)
    assert choose_lowerings(graph, ctx) is graph
    assert ctx.verdicts == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %c", "return %a", "returned"),
        ("a: f32[8, 6] @cuda", "a: f32[8, 6] {1, 8} @cuda", "contiguous"),
        ("all_gather (x) @g0[2]", "all_to_all (w) @g0[2] splits [5, 3] -> [4, 4]", "unequal"),
    ],
)
def test_some_results_only_the_backend_can_make(old: str, new: str, reason: str) -> None:
    text = BEFORE.replace("(x: f32[4, 6] @cuda,", "(w: f32[8, 6] @cuda, x: f32[4, 6] @cuda,").replace(old, new)
    ctx = context()
    assert chosen(text, ctx)["p"] == "library"
    assert any(v.subject == "p" and reason in v.reason for v in ctx.verdicts)


def test_a_bucket_is_carried_one_way() -> None:
    ctx = context()
    ctx = Context(replace(ctx.options, bucket_bytes=1 << 20), ctx.costs)
    text = BEFORE.replace("return %c", "return %a")
    merged = bucket_collectives(choose_lowerings(parse_graph(text).check(), ctx), ctx)
    assert sorted(vias(merged).values()) == ["library", "library", "peers"]
    merged = bucket_collectives(choose_lowerings(parse_graph(BEFORE).check(), ctx), ctx)
    assert sorted(vias(merged).values()) == ["library", "peers"]


def test_what_is_returned_cannot_be_planned_in_shared_memory() -> None:
    text = BEFORE.replace("all_gather (x) @g0[2]", "all_gather (x) @g0[2] via peers").replace("return %c", "return %a")
    with pytest.raises(CompilerBug, match="a lands in shared memory"):
        plan_memory(parse_graph(text).check(), context())


@pytest.mark.parametrize("call", ["all_reduce.sum (x) @g0[2] via peers", "broadcast (x) @g0[2] root 0 via peers"])
def test_copies_do_not_compute(call: str) -> None:
    graph = parse_graph(f"graph f(x: f32[4]) {{ p: pending (a: f32[4]) = start {call} a: f32[4] = wait p return %a }}")
    start = graph.nodes[0]
    assert isinstance(start, Start)
    with pytest.raises(CompilerBug, match="via peers"):
        check(start, graph)
