"""From where to where the storages of a graph are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dcompile.analyse.alias import storage_roots
from dcompile.collectives.nodes import Pending, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.types import Number

BEFORE = -1
"""Position of everything that exists before the first node: the inputs."""


@dataclass(frozen=True)
class Lifetime:
    """Positions in the graph's node order, both inclusive.

    Attributes:
        first: the node that first touches the storage (for an out-of-place collective's result: its Start);
            ``BEFORE`` for inputs.
        last: the last node that touches it; ``len(nodes)`` if the graph returns it; ``BEFORE`` for an unused input.
    """

    first: int
    last: int


def lifetimes(graph: Graph) -> dict[str, Lifetime]:
    """The lifetime of each storage, by its root (see ``alias.storage_roots``).

    From launch to wait a collective uses the storages of all its sources and all its results.
    """
    roots = storage_roots(graph)
    first = {roots[name]: BEFORE for name in graph.input_names}
    last = dict(first)
    for position in range(len(graph.nodes)):
        for name in _touched(graph, position):
            root = roots[name]
            first.setdefault(root, position)
            last[root] = position
    for name in graph.output_names:
        last[roots[name]] = len(graph.nodes)
    return {root: Lifetime(first[root], last[root]) for root in first}


def _touched(graph: Graph, position: int) -> Iterator[str]:
    """Tensor names whose storage the node at ``position`` needs."""
    node = graph.nodes[position]
    if isinstance(node, Wait):
        start = graph.nodes[graph.producer[node.pending]]
        yield from start.operands
        yield from (out.name for out in node.outs)
        return
    yield from node.operands
    for item in node.defs:
        if isinstance(item, Pending):
            if not item.in_place:
                yield from (result.name for result in item.results)
        elif not isinstance(item, Number):
            yield item.name


__all__ = ["BEFORE", "Lifetime", "lifetimes"]
