"""What must come before what: by storage and program order, the in-flight rules of collectives included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dcompile.analyse.alias import Footprint, footprints, storage_roots
from dcompile.analyse.remember import once_a_graph
from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.symbolic import Knowledge, is_check, learned, symbols_of
from dcompile.ir.types import Number


@once_a_graph
def predecessors(graph: Graph) -> tuple[frozenset[int], ...]:
    """Direct predecessors of each node, as positions in program order.

    An order that respects them all behaves like program order:

    - a name is defined before it is read;
    - per storage: reads follow the write before them, writes follow the reads and the write before them;
    - a Wait counts as another read of its collective's sources (in place: another write), so no write of the sources
      (in place: no touch) moves into the flight;
    - launches of one group keep their order, so that all ranks launch in one order;
    - library calls with effects keep their order; nothing passes a barrier;
    - a number is learned and checked before it is used.

    Time is linear in nodes and operands, except around barriers, which depend on every node since the last one.
    """
    tables = _Tables()
    numbers = Knowledge(graph)
    found: list[frozenset[int]] = []
    touched = touched_by_node(graph)
    for position, node in enumerate(graph.nodes):
        reads, writes = touched[position]
        before = {graph.producer[name] for name in node.operands if name in graph.producer}
        before |= tables.memory(position, reads, writes)
        before |= tables.sequence(position, node)
        before |= numbers.before(position, node)
        before.discard(position)
        found.append(frozenset(before))
    return tuple(found)


@once_a_graph
def touched_by_node(graph: Graph) -> list[tuple[set[str], set[str]]]:
    """``touched_roots`` of every node, by position."""
    roots = storage_roots(graph)
    return [touched_roots(graph, node, roots) for node in graph.nodes]


def touched_roots(graph: Graph, node: Node, roots: dict[str, str]) -> tuple[set[str], set[str]]:
    """Storages ``node`` reads and storages it writes, by root; what it defines counts as written.

    A Wait reads its collective's sources, in place it writes them.
    """
    writes = {roots[name] for name in node.mutates}
    if isinstance(node, Wait):
        reads = {roots[name] for name in graph.nodes[graph.producer[node.pending]].operands}
        writes |= {roots[out.name] for out in node.outs}
    elif isinstance(node, Start):
        reads = {roots[name] for name in node.operands}
    else:
        reads = {roots[name] for name in node.operands}
        owned = (item.name for item in node.defs if not isinstance(item, Number))
        writes |= {roots[name] for name in owned if roots[name] not in reads}
    return reads - writes, writes


@dataclass
class _Tables:
    """Last writers and the readers since, per storage; last of each ordered sequence."""

    writer: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[int]] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)
    effect: int | None = None
    barrier: int | None = None
    since_barrier: list[int] = field(default_factory=list)

    def memory(self, position: int, reads: set[str], writes: set[str]) -> set[int]:
        before: set[int] = set()
        for root in reads | writes:
            if root in self.writer:
                before.add(self.writer[root])
        for root in reads:
            self.readers.setdefault(root, []).append(position)
        for root in writes:
            before.update(self.readers.pop(root, ()))
            self.writer[root] = position
        return before

    def sequence(self, position: int, node: Node) -> set[int]:
        before: set[int] = set()
        if self.barrier is not None:
            before.add(self.barrier)
        if isinstance(node, Start):
            if node.group.label in self.launch:
                before.add(self.launch[node.group.label])
            self.launch[node.group.label] = position
        if isinstance(node, Extern) and (node.effect or node.barrier):
            if self.effect is not None:
                before.add(self.effect)
            self.effect = position
        if isinstance(node, Extern) and node.barrier:
            before.update(self.since_barrier)
            self.barrier, self.since_barrier = position, []
        else:
            self.since_barrier.append(position)
        return before


def is_legal(graph: Graph, order: Sequence[int]) -> bool:
    """Whether executing the nodes in ``order`` (positions in program order) gives what program order gives, safely.

    Decided by running ``order`` over a model of memory rather than by ``predecessors``: every access must find its
    storage in the same state (number of writes so far) as in program order, nobody may touch bytes that a collective
    in flight forbids, launches of a group, effects and barriers must keep their places. Program order itself is illegal
    when it touches a buffer in flight.
    """
    if sorted(order) != list(range(len(graph.nodes))):
        return False
    prints = footprints(graph)
    accesses = touched_by_node(graph)
    expected = _epochs(range(len(graph.nodes)), accesses)
    return (
        _defined_before_use(graph, order)
        and _epochs(order, accesses) == expected
        and _sequences(graph, order) == _sequences(graph, range(len(graph.nodes)))
        and _numbers_known(graph, order)
        and _respects_flights(graph, order, prints)
    )


def _defined_before_use(graph: Graph, order: Sequence[int]) -> bool:
    known = set(graph.input_names)
    for position in order:
        node = graph.nodes[position]
        if any(name not in known for name in node.operands):
            return False
        known.update(item.name for item in node.defs)
    return graph.output_names <= known


def _numbers_known(graph: Graph, order: Sequence[int]) -> bool:
    """Whether every node finds the numbers it uses learned, and checked as often as in program order."""
    learned_names = learned(graph).keys()
    if not learned_names:
        return True
    uses = [{s.name for s in symbols_of(node)} & learned_names for node in graph.nodes]

    def states(positions: Sequence[int]) -> dict[int, list[tuple[str, int]]]:
        seen: dict[str, int] = {}
        found: dict[int, list[tuple[str, int]]] = {}
        for position in positions:
            node = graph.nodes[position]
            for number in node.binds if isinstance(node, Extern) else ():
                seen[number.name] = 1
            found[position] = sorted((name, seen.get(name, 0)) for name in uses[position])
            if is_check(node):
                seen.update({name: seen.get(name, 0) + 1 for name in uses[position]})
        return found

    expected, found = states(range(len(graph.nodes))), states(order)
    # more checks than in program order do no harm
    return all(
        have >= want
        for position, state in expected.items()
        for (_, want), (_, have) in zip(state, found[position], strict=True)
    )


def _epochs(order: Sequence[int], accesses: list[tuple[set[str], set[str]]]) -> dict[tuple[int, str], int]:
    """For each access (node, storage) how many writes of the storage came before it."""
    count: dict[str, int] = {}
    found: dict[tuple[int, str], int] = {}
    for position in order:
        reads, writes = accesses[position]
        for root in reads | writes:
            found[position, root] = count.get(root, 0)
        for root in writes:
            count[root] = count.get(root, 0) + 1
    return found


def _sequences(graph: Graph, order: Sequence[int]) -> object:
    """Everything that must come in one fixed sequence: launches by group, effects, and the nodes between barriers."""
    launches: dict[str, list[int]] = {}
    effects: list[int] = []
    stretches: list[set[int]] = [set()]
    for position in order:
        node = graph.nodes[position]
        if isinstance(node, Start):
            launches.setdefault(node.group.label, []).append(position)
        if isinstance(node, Extern) and (node.effect or node.barrier):
            effects.append(position)
        if isinstance(node, Extern) and node.barrier:
            stretches += [{position}, set()]
        else:
            stretches[-1].add(position)
    return launches, effects, stretches


def _respects_flights(graph: Graph, order: Sequence[int], prints: dict[str, Footprint]) -> bool:
    """Whether nobody touches what a collective in flight forbids, by bytes."""
    no_write, no_touch = _Held(), _Held()
    flying: set[str] = set()
    for position in order:
        node = graph.nodes[position]
        if isinstance(node, Wait):
            start = graph.nodes[graph.producer[node.pending]]
            if node.pending not in flying or not isinstance(start, Start):
                return False
            flying.remove(node.pending)
            no_write.release(node.pending)
            no_touch.release(node.pending)
            continue
        written = [prints[name] for name in node.mutates]
        read = () if isinstance(node, View) else node.operands  # making a view touches no memory
        touched = written + [prints[name] for name in read]
        if no_touch.clash(touched) or no_write.clash(written):
            return False
        if isinstance(node, Start):
            flying.add(node.pending.name)
            sources = [prints[name] for name in node.operands]
            no_write.hold(node.pending.name, sources)
            results = [prints[result.name] for result in node.pending.results]
            no_touch.hold(node.pending.name, sources if node.pending.in_place else results)
    return not flying


class _Held:
    """Bytes that collectives in flight hold, by storage, so that a node is compared with its own storages' only."""

    def __init__(self) -> None:
        self._by_root: dict[str, dict[str, list[Footprint]]] = {}
        self._roots: dict[str, set[str]] = {}

    def hold(self, pending: str, prints: list[Footprint]) -> None:
        self._roots[pending] = {held.root for held in prints}
        for held in prints:
            self._by_root.setdefault(held.root, {}).setdefault(pending, []).append(held)

    def release(self, pending: str) -> None:
        for root in self._roots.pop(pending):
            del self._by_root[root][pending]

    def clash(self, prints: list[Footprint]) -> bool:
        """Whether any of ``prints`` may share a byte with what is held."""
        return any(
            mine.overlaps(theirs)
            for mine in prints
            for held in self._by_root.get(mine.root, {}).values()
            for theirs in held
        )


__all__ = ["is_legal", "predecessors", "touched_by_node", "touched_roots"]
