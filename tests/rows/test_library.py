"""Rows K and L: library calls, on purpose and for want of a rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dcompile
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import DCompileError
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import chk

custom = torch.ops.dcompile_rows


@pytest.mark.row("L1", "L10")
def test_results_of_every_kind() -> None:
    def program(x: Tensor) -> tuple[object, ...]:
        first, count, nothing, others, half = custom.mixed(x)
        low, high = custom.halves(x * 2)
        return first * count, nothing, others[1] + half, low + high, custom.half_count(x) * x

    seen = chk(program, torch.randn(5))
    assert sorted(set(seen.externs)) == [f"dcompile_rows.{n}.default" for n in ("half_count", "halves", "mixed")]
    everything = chk(lambda x: custom.mixed(x), torch.randn(4, 3))
    assert everything.result[1] == 12
    text = print_graph(everything.plan.graph)
    assert "promises (1: 12, 5: 6.0)" in text
    assert print_graph(parse_graph(text)) == text


@pytest.mark.row("L1")
def test_a_number_that_is_not_what_was_promised_is_an_error() -> None:
    torch.compiler.reset()
    compiled = dcompile.compile(lambda x: x * custom.total(x), cache_dir=None)
    with pytest.raises(DCompileError, match=r"dcompile_rows.total.default at test_library.py:\d+ returned .*Instead"):
        compiled(torch.ones(4))


@pytest.mark.row("L10")
def test_a_size_that_two_results_have_is_defined_once() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return values * 2, inverse, counts + 1, torch.zeros(values.shape[0]) + counts

    def own(x: Tensor) -> Tensor:
        found, count = custom.positive(x)
        return found * 2 + torch.arange(count)

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        seen = chk(program, torch.randint(0, 5, (20,)), also=[(torch.randint(0, 9, (20,)),)])
        assert len(seen.graphs) == 1
        assert len([d for node in seen.plan.graph.nodes for d in node.defs if type(d).__name__ == "Number"]) == 1
        assert len(chk(own, torch.randn(20), also=[(torch.randn(20),)]).graphs) == 1
