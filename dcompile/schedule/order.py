"""The one way to change the order of a graph's nodes."""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.analyse.dependence import is_legal, predecessors
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph


def reorder(graph: Graph, order: Sequence[int]) -> Graph:
    """The same nodes in another order.

    Args:
        graph: nodes in a legal order.
        order: for each place of the result the position of its node in ``graph``.

    Raises:
        CompilerBug: ``order`` is not a permutation, or a node would run before one it depends on; names the first
            node that is out of place.
    """
    if sorted(order) != list(range(len(graph.nodes))):
        raise CompilerBug(f"{graph.name}: {len(order)} positions are no permutation of {len(graph.nodes)} nodes")
    if all(place == position for place, position in enumerate(order)):
        return graph
    if not is_legal(graph, order):
        raise CompilerBug(f"{graph.name}: the order breaks a dependence; {_first_broken(graph, order)}")
    return graph.with_nodes(tuple(graph.nodes[position] for position in order)).check()


def _first_broken(graph: Graph, order: Sequence[int]) -> str:
    """A sentence naming the first node that runs before a node it depends on."""
    done: set[int] = set()
    needs = predecessors(graph)
    for position in order:
        for other in sorted(needs[position] - done):
            names = [", ".join(d.name for d in graph.nodes[p].defs) or f"node {p}" for p in (position, other)]
            source = graph.nodes[position].origin.source or "unknown line"
            return f"{names[0]} ({source}) would run before {names[1]}"
        done.add(position)
    return "an access would fall between a launch and its wait"
