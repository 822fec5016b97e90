"""Random programs: the two answers to "may this order run" agree, and launches follow the table."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dcompile.analyse.dependence import is_legal, predecessors
from dcompile.collectives.nodes import Start
from dcompile.collectives.rules import check
from dcompile.ir.graph import Graph
from tests.strategies import graphs


def random_order(graph: Graph, rng: random.Random) -> list[int]:
    """A random order that respects ``predecessors``."""
    before = predecessors(graph)
    order: list[int] = []
    done: set[int] = set()
    while len(order) < len(before):
        ready = [n for n in range(len(before)) if n not in done and before[n] <= done]
        order.append(rng.choice(ready))
        done.add(order[-1])
    return order


@settings(max_examples=60)
@given(graphs(), st.integers(0, 2**32))
def test_predecessors_and_the_legality_check_agree(graph: Graph, seed: int) -> None:
    rng = random.Random(seed)
    before = predecessors(graph)
    assert is_legal(graph, range(len(graph.nodes)))
    order = random_order(graph, rng)
    assert is_legal(graph, order)
    for _ in range(4):
        if len(order) < 2:
            break
        moved = list(order)
        moved.insert(rng.randrange(len(moved)), moved.pop(rng.randrange(len(moved))))
        position = {node: n for n, node in enumerate(moved)}
        allowed = all(position[b] < position[n] for n, bs in enumerate(before) for b in bs)
        assert allowed == is_legal(graph, moved)


@settings(max_examples=40)
@given(graphs())
def test_random_launches_follow_the_table(graph: Graph) -> None:
    for node in graph.nodes:
        if isinstance(node, Start):
            check(node, graph)
