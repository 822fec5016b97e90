"""The verifier against brute force: it accepts every legal order, and of the others those that share no byte."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dcompile.analyse.dependence import is_legal
from dcompile.analyse.verify import verify
from dcompile.errors import UnsafePlan
from dcompile.ir.graph import Graph
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.simplify import simplify_graph
from tests.strategies import GROUP, assert_same, copy_inputs, graphs, random_inputs
from tests.unit.analyse.orders import any_order, is_harmless, overlapping_program
from tests.unit.schedule.passes import context

ORDERS = 12


def in_order(graph: Graph, order: list[int]) -> Graph:
    """``reorder`` without its check."""
    return graph.with_nodes(tuple(graph.nodes[position] for position in order)).check()


def is_accepted(graph: Graph, program: Graph) -> bool:
    try:
        verify(plan_memory(graph, context()), program)
    except UnsafePlan:
        return False
    return True


def check_orders(program: Graph, rng: random.Random) -> tuple[int, int, int]:
    """How many orders were legal, harmless though illegal, and rejected."""
    legal = harmless = rejected = 0
    inputs = random_inputs(program, GROUP.size)
    expected_inputs = copy_inputs(inputs)
    expected = run_reference([program] * GROUP.size, expected_inputs)
    for _ in range(ORDERS):
        order = any_order(program, rng)
        graph = in_order(program, order)
        accepted = is_accepted(graph, program)
        assert accepted == is_harmless(program, order), order
        if is_legal(program, order):
            assert accepted
            legal += 1
        elif accepted:  # the same numbers, although whole storages are not touched in program order
            mine = copy_inputs(inputs)
            assert_same(run_reference([graph] * GROUP.size, mine), expected)
            assert_same(mine, expected_inputs)
            harmless += 1
        else:
            rejected += 1
    return legal, harmless, rejected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_orders_of_programs_that_write_through_overlapping_views(seed: int) -> None:
    rng = random.Random(seed)
    check_orders(overlapping_program(rng, 14), rng)


def test_the_random_orders_are_of_all_three_sorts() -> None:
    total = [0, 0, 0]
    for seed in range(12):
        rng = random.Random(seed)
        total = [a + b for a, b in zip(total, check_orders(overlapping_program(rng, 14), rng), strict=True)]
    assert min(total) >= 3, total


@settings(max_examples=25, deadline=None)
@given(graphs(max_nodes=12), st.integers(0, 2**32))
def test_orders_of_compiled_programs(graph: Graph, seed: int) -> None:
    check_orders(fuse(simplify_graph(graph, context()), context()), random.Random(seed))
