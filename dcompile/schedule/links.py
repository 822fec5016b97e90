"""What of a scheduling problem depends on the graph alone: who needs whom, and the two ends of each collective."""

from __future__ import annotations

from dataclasses import dataclass

from dcompile.analyse.dependence import predecessors
from dcompile.analyse.remember import once_a_graph
from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import as_size
from dcompile.ir.nodes import View


@dataclass(frozen=True)
class Links:
    """Lists are indexed by position. *Lazy* are nodes that take no time themselves: waits and views.

    Attributes:
        before: direct predecessors in program order (ascending).
        after: direct successors (ascending).
        carried: bytes of sources and results in flight, by position of the Start.
        lane: group label, by position of the Start.
        wait_of, start_of: the two ends of each collective.
        lazy: whether each node is lazy.
        missing: how many eager nodes each eager node or wait needs, seen through lazy ones.
        users: the eager nodes and waits that need each node, seen the same way.
        waits: the waits each node needs, a wait itself included, seen the same way.
    """

    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    carried: dict[int, int]
    lane: dict[int, str]
    wait_of: dict[int, int]
    start_of: dict[int, int]
    lazy: tuple[bool, ...]
    missing: tuple[int, ...]
    users: tuple[tuple[int, ...], ...]
    waits: tuple[tuple[int, ...], ...]


@once_a_graph
def links(graph: Graph) -> Links:
    """The links of ``graph``."""
    before = tuple(tuple(sorted(found)) for found in predecessors(graph))
    after: list[list[int]] = [[] for _ in before]
    for position, found in enumerate(before):
        for other in found:
            after[other].append(position)
    carried: dict[int, int] = {}
    lane: dict[int, str] = {}
    wait_of: dict[int, int] = {}
    start_of: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Start):
            carried[position] = carried_bytes(graph, node)
            lane[position] = node.group.label
        elif isinstance(node, Wait):
            start = graph.producer[node.pending]
            wait_of[start] = position
            start_of[position] = start
    lazy = tuple(isinstance(node, Wait | View) for node in graph.nodes)
    missing, users, waits = _through_lazy(before, lazy, start_of)
    return Links(before, tuple(map(tuple, after)), carried, lane, wait_of, start_of, lazy, missing, users, waits)


def carried_bytes(graph: Graph, start: Start) -> int:
    """Bytes a collective holds from launch to wait, at the size hints."""
    values = [graph.value(name) for name in start.operands]
    if not start.pending.in_place:
        values += start.pending.results
    return sum(hint(as_size(value.nbytes), graph.size_hints) for value in values)


Positions = tuple[tuple[int, ...], ...]


def _through_lazy(
    before: Positions, lazy: tuple[bool, ...], start_of: dict[int, int]
) -> tuple[tuple[int, ...], Positions, Positions]:
    """``missing``, ``users`` and ``waits`` of ``Links``."""
    eager: dict[int, set[int]] = {}
    missing = [0] * len(before)
    users: list[list[int]] = [[] for _ in before]
    waits: list[tuple[int, ...]] = []
    for position, found in enumerate(before):
        needs: set[int] | tuple[int, ...] = found
        ends: tuple[int, ...] = (position,) if position in start_of else ()
        hidden = [other for other in found if lazy[other]]
        if hidden:
            needs = {other for other in found if not lazy[other]}.union(*(eager[other] for other in hidden))
            ends = tuple(sorted({*ends}.union(*(waits[other] for other in hidden))))
        waits.append(ends)
        if lazy[position]:
            eager[position] = set(needs)
        if not lazy[position] or position in start_of:
            missing[position] = len(needs)
            for other in needs:
                users[other].append(position)
    return tuple(missing), tuple(map(tuple, users)), tuple(waits)
