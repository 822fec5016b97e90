"""Where collectives stand in the program that could start long before they are needed: gathers of sharded parameters.

All ranks launch the collectives of one group in the order of the program, so a gather that stands behind a reduction
cannot start before it, however early the schedule would like to. Here each such gather gets the place from which its
transfer ends when its first reader is due, as far as compute covers it: last needed, last placed, every transfer in
front of the one after it (backward list scheduling, as for instructions with latency). How early it is launched in the
end is the schedule's choice, within its memory budget.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from dcompile.analyse.context import NodePrices
from dcompile.analyse.cost import CostModel
from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Node, Pack, Pointwise, View
from dcompile.schedule.links import carried_bytes
from dcompile.schedule.merge import true_predecessors
from dcompile.schedule.simulate import Problem, prepare

AHEAD = 2.0
"""A launch stands this many transfer times before its first reader: reductions share the lane, and compute beside a
transfer slows down. Predicted backward pass of a 125M Llama-like model, fully sharded over two ranks on a 25 GB/s link:
28.3 ms, and 32.6 ms with every gather left before its reader."""

CHEAP = 0.5
"""A chain that feeds a launch moves with it if its nodes take at most this share of the transfer."""


def prefetch(
    graph: Graph, costs: CostModel, prices: NodePrices | None = None, in_flight_bytes: int | None = None
) -> Graph:
    """``graph`` with launches that only depend on inputs moved to where they are due, what feeds them included.

    Args:
        in_flight_bytes: so much of them may be in flight at once, a single one in any case; None for no bound.
    """
    if sum(isinstance(node, Start) for node in graph.nodes) < 2:
        return graph
    problem = prepare(graph, costs, prices)
    before = true_predecessors(graph)
    clock = (0.0, *accumulate(problem.cost))
    free: dict[str, float] = {}
    places: dict[int, int] = {}
    chains: dict[int, list[int]] = {}
    for wait in sorted(problem.start_of, reverse=True):
        start = problem.start_of[wait]
        lane, transfer_us = problem.lane[start], problem.transfer[start]
        due_us = min(clock[wait], free.get(lane, clock[wait]))
        free[lane] = due_us - transfer_us
        chain = _chain(start, before, problem)
        if chain is not None:
            chains[wait] = chain
            places[wait] = min(max(bisect_right(clock, due_us - AHEAD * transfer_us) - 1, 0), wait)
    if in_flight_bytes is not None:
        places = _bounded(places, problem, in_flight_bytes)
    key = [(position, 1) for position in range(len(graph.nodes))]
    for wait in sorted(places, reverse=True):
        start, place = problem.start_of[wait], places[wait]
        for position in chains[wait] if place < start else [start]:
            key[position] = min(key[position], (place, 0)) if position != start else (place, 0)
    order = sorted(range(len(graph.nodes)), key=lambda position: (*key[position], position))
    if order == list(range(len(order))):
        return graph
    return graph.with_nodes(tuple(graph.nodes[position] for position in order)).check()


def _bounded(places: dict[int, int], problem: Problem, in_flight_bytes: int) -> dict[int, int]:
    """Places, by wait, no earlier than behind the waits that must be over for the bound to hold."""
    flying: deque[tuple[int, int]] = deque()
    total = floor = 0
    found: dict[int, int] = {}
    for wait in sorted(places):
        held = problem.carried[problem.start_of[wait]]
        while flying and total + held > in_flight_bytes:
            over, freed = flying.popleft()
            total, floor = total - freed, over + 1
        flying.append((wait, held))
        total += held
        found[wait] = min(max(places[wait], floor), wait)
    return found


def wait_in_time(graph: Graph, in_flight_bytes: int) -> Graph:
    """``graph`` with the oldest collectives waited for where a launch would put more than ``in_flight_bytes`` in
    flight. A launch that exceeds it alone has nothing beside it."""
    flying: deque[tuple[str, int]] = deque()
    early: set[str] = set()
    total = 0
    nodes: list[Node] = []
    waits = {node.pending: node for node in graph.nodes if isinstance(node, Wait)}
    for node in graph.nodes:
        if isinstance(node, Start):
            held = carried_bytes(graph, node)
            while flying and total + held > in_flight_bytes:
                oldest, freed = flying.popleft()
                total -= freed
                early.add(oldest)
                nodes.append(waits[oldest])
            flying.append((node.pending.name, held))
            total += held
        elif isinstance(node, Wait):
            if node.pending in early:
                continue
            total -= sum(held for name, held in flying if name == node.pending)
            flying = deque((name, held) for name, held in flying if name != node.pending)
        nodes.append(node)
    return graph.with_nodes(tuple(nodes)) if early else graph


def _chain(start: int, before: Sequence[tuple[int, ...]], problem: Problem) -> list[int] | None:
    """``start`` and everything it depends on; None if that is more than a few cheap loops over inputs."""
    found: set[int] = set()
    stack = [start]
    spent_us = 0.0
    while stack:
        position = stack.pop()
        if position in found:
            continue
        found.add(position)
        if position != start:
            spent_us += problem.cost[position]
            if not _movable(problem.graph.nodes[position]) or spent_us > CHEAP * problem.transfer[start]:
                return None
        stack.extend(before[position])
    return sorted(found)


def _movable(node: Node) -> bool:
    return isinstance(node, Pointwise | View | Pack | Kernel) and not node.mutates
