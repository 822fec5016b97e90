import pytest
import torch

from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.reference import run_reference
from dcompile.schedule.in_place import donate_sources, recover_in_place
from tests.unit.schedule.passes import context

COPIED_BACK = """\
graph inference(x: f32[4], y: f32[4]) {
  p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
  a: f32[4] = pointwise (i0: 4) y[i0] * 2.0:f32
  r: f32[4] = wait p
  x1: f32[4] = store set x (i0: 4) [i0] = r[i0]
  z: f32[4] = pointwise (i0: 4) x1[i0] + a[i0]
  return %z
}
"""
IN_PLACE = """\
graph inference(x: f32[4], y: f32[4]) {
  p: pending in place (r: f32[4]) = start all_reduce.sum (x) @g0[2]
  a: f32[4] = pointwise (i0: 4) y[i0] * 2.0:f32
  r: f32[4] = wait p
  z: f32[4] = pointwise (i0: 4) r[i0] + a[i0]
  return %z
}
"""


def same_numbers(before: Graph, after: Graph) -> None:
    """Two ranks give the same outputs and leave the same inputs behind."""
    results = []
    for graph in (before, after):
        generator = torch.Generator().manual_seed(0)
        inputs = [[torch.randn(4, generator=generator), torch.randn(4, generator=generator)] for _ in range(2)]
        outputs = run_reference([graph, graph], inputs)
        results.append([*(t for rank in outputs for t in rank), *(t for rank in inputs for t in rank)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_copy_back_becomes_a_launch_in_place() -> None:
    before = parse_graph(COPIED_BACK)
    after = recover_in_place(before, context())
    assert print_graph(after) == IN_PLACE
    same_numbers(before, after)


@pytest.mark.parametrize(
    ("old", "new"),
    {
        "source read in flight": ("y[i0] * 2.0:f32", "x[i0] * 2.0:f32"),
        "copied into another tensor": ("store set x ", "store set y "),
        "added, not copied": ("store set x ", "store add x "),
        "changed on the way": ("= r[i0]\n", "= r[i0] * 2.0:f32\n"),
        "a part only": ("store set x (i0: 4)", "store set x (i0: 3)"),
        "shifted": ("[i0] = r[i0]", "[i0] = r[3 - i0]"),
        "result kept while the source changes": (
            "  z: f32[4] = pointwise (i0: 4) x1[i0] + a[i0]",
            "  x2: f32[4] = store add x1 (i0: 4) [i0] = a[i0]\n  z: f32[4] = pointwise (i0: 4) x2[i0] + r[i0]",
        ),
    }.values(),
)
def test_what_can_be_told_apart_stays_out_of_place(old: str, new: str) -> None:
    assert COPIED_BACK.count(old) == 1
    before = parse_graph(COPIED_BACK.replace(old, new))
    assert recover_in_place(before, context()) is before


FRESH = """\
graph backward(x: f32[4], y: f32[4]) {
  t: f32[4] = pointwise (i0: 4) x[i0] * y[i0]
  p: pending (r: f32[4]) = start all_reduce.sum (t) @g0[2]
  r: f32[4] = wait p
  z: f32[4] = pointwise (i0: 4) r[i0] + y[i0]
  return %z
}
"""


@pytest.mark.row("S3")
def test_a_dying_temporary_is_worked_in() -> None:
    before = parse_graph(FRESH)
    after = donate_sources(before, context())
    assert print_graph(after) == FRESH.replace("p: pending (r", "p: pending in place (r")
    same_numbers(before, after)


@pytest.mark.parametrize(
    ("old", "new"),
    {
        "an input": ("(t) @g0", "(x) @g0"),
        "read later": ("r[i0] + y[i0]", "r[i0] + t[i0]"),
        "returned": ("return %z", "return %z, %t"),
        "a gather": ("all_reduce.sum (t) @g0[2]", "all_gather (t) @g0[1]"),
        "launched twice": (
            "  r: f32[4] = wait p",
            "  q: pending (s: f32[4]) = start broadcast (t) @g0[2] root 0\n  s: f32[4] = wait q\n  r: f32[4] = wait p",
        ),
    }.values(),
)
def test_a_source_that_is_needed_is_not_given_away(old: str, new: str) -> None:
    assert FRESH.count(old) == 1
    before = parse_graph(FRESH.replace(old, new))
    assert donate_sources(before, context()) is before
