"""Random programs through the passes that rewrite loops: every pass keeps the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from dcompile.ir.graph import Graph
from dcompile.pipeline import PASSES
from dcompile.reference import run_reference
from tests.strategies import GROUP, assert_same, copy_inputs, graphs, random_inputs
from tests.unit.schedule.passes import context


@pytest.mark.parametrize("upto", range(1, len(PASSES) + 1), ids=[step.name for step in PASSES])
@settings(max_examples=60)
@given(graph=graphs(max_nodes=14))
def test_the_pipeline_up_to_each_pass_keeps_the_numbers(upto: int, graph: Graph) -> None:
    inputs = random_inputs(graph, GROUP.size)
    first, second = copy_inputs(inputs), copy_inputs(inputs)
    ctx, after = context(), graph
    for step in PASSES[:upto]:
        after = step.run(after, ctx).check()
    expected = run_reference([graph] * GROUP.size, first)
    assert_same(run_reference([after] * GROUP.size, second), expected)
    assert_same(second, first)
