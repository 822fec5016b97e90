"""The helpers of the row tests see what they claim to see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.rows.check import chk, same, seen_stride, sharing


def test_programs_are_counted_and_described() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        return (torch.mm(x + 1, w).relu() * 2).sum(0)

    seen = chk(program, torch.randn(8, 8), torch.randn(8, 8))
    assert (seen.K, seen.X, seen.fallbacks) == (2, 1, ())
    assert seen.at("aten.add") < seen.at("aten.mm") < seen.at("aten.relu")
    assert [step.kind for step in seen.schedule] == ["kernel", "extern", "kernel"]
    assert set(seen.schedule[0].makes) < set(seen.schedule[1].reads)
    assert "aten.relu" in seen.code
    assert "def call(inputs)" in seen.host
    kinds = [event.what for event in seen.memory]
    assert kinds.count("free") == 2
    assert "allocate" in kinds


def test_differences_are_seen() -> None:
    x = torch.randn(4, 6)
    for wrong in (
        x.double(),
        x.t().contiguous().t(),
        x[:3],
        x + 1e-2,
        x.index_fill(0, torch.tensor([1]), float("nan")),
    ):
        with pytest.raises(AssertionError):
            same(wrong, x)
    assert sharing((x, x[1:], x.clone())) == [(0, 0), (0, 24), (2, 0)]
    assert seen_stride(x.t()[:, :1]) == [1]


def test_gradients_and_further_sizes_are_compared() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    seen = chk(lambda x: x.tanh() * x, x, grad=True)
    assert [graph.name.rstrip("0123456789") for graph in seen.graphs] == ["forward", "backward"]
    more = chk(lambda x: x * 2, torch.randn(3, 4), also=[(torch.randn(7, 4),)], dynamic=True)
    assert len(more.graphs) == 1
