from __future__ import annotations

import hypothesis
import pytest

from dcompile.collectives.group import Group
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import ParseError
from dcompile.ir.graph import Graph
from tests.strategies import contiguous, graphs

TEXT = """\
graph backward(x: f32[4], y: f32[2, 3]) {
  p: pending in place (x1: f32[4], y1: f32[2, 3]) = start all_reduce.avg (x, y) @g0[2]  # c10d.allreduce_ @a.py:1
  q: pending (z: f32[2, 3]) = start broadcast (y) @g1[4] root 3
  x1: f32[4], y1: f32[2, 3] = wait p
  z: f32[2, 3] = wait q
  return %x1, %z
}
"""


def test_collectives_print_and_parse() -> None:
    graph = parse_graph(TEXT)
    first, second, wait, _ = graph.nodes
    results = (contiguous("x1", (4,)), contiguous("y1", (2, 3)))
    assert first == Start(
        pending=Pending("p", results, True), kind=Kind.ALL_REDUCE, group=Group("g0", 2), sources=("x", "y"),
        reduction="avg",
    )  # fmt: skip
    assert first.origin.source == "a.py:1"
    assert second == Start(
        pending=Pending("q", (contiguous("z", (2, 3)),), False), kind=Kind.BROADCAST, group=Group("g1", 4),
        sources=("y",), root=3,
    )  # fmt: skip
    assert wait == Wait(outs=results, pending="p")
    assert print_graph(graph) == TEXT


@hypothesis.given(graphs())
@hypothesis.settings(max_examples=60)
def test_round_trip_of_random_graphs(graph: Graph) -> None:
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("all_reduce.avg", "all_reduce.mean", "line 2, column 59: expected a reduction"),
        ("all_reduce.avg", "reduce", "line 2, column 59: expected a kind of collective"),
        ("@g0[2]", "@g0", "line 3, column 3: expected '\\['"),
        ("q: pending (z: f32[2, 3])", "q: f32[2, 3]", "expected one pending left of"),
    ],
)
def test_errors_say_what_was_expected(old: str, new: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_graph(TEXT.replace(old, new))
