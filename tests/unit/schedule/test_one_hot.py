from __future__ import annotations

import pytest
import torch

from dcompile.collectives.text import parse_graph
from dcompile.ir.nodes import Pointwise, Reduction
from dcompile.reference import run_reference
from dcompile.schedule.one_hot import close_one_hot_sums
from tests.unit.schedule.passes import apply, context, same

SUM = """
graph f(label: i64[6], s: f32[6], x: f32[6, 9]) {{
  t: f32[6] = reduce sum (i0: 6; r0: 9) {body}
  return %t
}}"""

CLOSED = {
    "in range": "where(index(r0) == wrap_index(label[i0], 9:i64), -1.0:f32, 0.0:f32) * s[i0]",
    "any label": "where(label[i0] == index(r0), s[i0], 0.5:f32)",
    "with a condition": "where(and(s[i0] > 0.0:f32, index(r0) == label[i0]), s[i0], 2.0:f32)",
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_sum_with_one_hit_has_no_loop(case: str) -> None:
    graph = parse_graph(SUM.format(body=CLOSED[case])).check()
    after = close_one_hot_sums(graph, context()).check()
    assert [type(node) for node in after.nodes] == [Pointwise]
    labels = torch.tensor([0, 8, 3, 4, -1, 5] if case == "in range" else [0, 8, 9, -1, 2**40, 5])
    inputs = [labels, torch.randn(6), torch.randn(6, 9)]
    ((want,), (got,)) = (run_reference([g], [[x.clone() for x in inputs]])[0] for g in (graph, after))
    torch.testing.assert_close(got, want)


def test_a_hit_among_infinite_zeros_stays_not_a_number() -> None:
    graph = parse_graph(SUM.format(body=CLOSED["in range"])).check()
    after = close_one_hot_sums(graph, context()).check()
    inputs = [torch.arange(6), torch.full((6,), torch.inf), torch.randn(6, 9)]
    ((want,), (got,)) = (run_reference([g], [[x.clone() for x in inputs]])[0] for g in (graph, after))
    assert want.isnan().all()
    assert got.isnan().all()


@pytest.mark.parametrize(
    "body",
    [
        "where(index(r0) == label[i0], x[i0, r0], 0.0:f32)",
        "where(index(r0) == label[i0], s[i0], 0.0:f32) + x[i0, r0]",
        "where(index(2*r0) == label[i0], s[i0], 0.0:f32)",
        "where(index(r0) == label[i0], s[i0], where(index(r0) == label[0], 1.0:f32, 0.0:f32))",
    ],
)
def test_other_sums_keep_their_loop(body: str) -> None:
    text = SUM.format(body=body)
    assert apply(close_one_hot_sums, text) == same(text)
    assert any(isinstance(node, Reduction) for node in parse_graph(text).nodes)
