"""Bytes alive while nodes run in some order. Inputs are not counted: no order can change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.dependence import touched_by_node
from dcompile.analyse.remember import once_a_graph
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph, given_bytes, hint
from dcompile.ir.index import as_size


@dataclass(frozen=True)
class Footing:
    """What each node touches, at the size hints.

    Attributes:
        touched: storages each node touches, by position; storages are numbers.
        nbytes: bytes of each storage.
        users: how many nodes touch each storage, plus one if the graph returns it.
    """

    touched: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    users: tuple[int, ...]


@once_a_graph
def footing(graph: Graph) -> Footing:
    """Storages of ``graph`` by node; those of inputs are left out."""
    roots = storage_roots(graph)
    owned = [root for root in dict.fromkeys(roots.values()) if root not in graph.input_names]
    number = {root: n for n, root in enumerate(owned)}
    users = [0] * len(owned)
    touched = []
    for node, (reads, writes) in zip(graph.nodes, touched_by_node(graph), strict=True):
        names = reads | writes
        if isinstance(node, Start) and not node.pending.in_place:
            names |= {result.name for result in node.pending.results}
        touched.append(tuple(sorted(number[root] for root in names if root in number)))
        for storage in touched[-1]:
            users[storage] += 1
    for root in {roots[name] for name in graph.output_names} & number.keys():
        users[number[root]] += 1
    nbytes = tuple(hint(as_size(graph.value(root).nbytes), graph.size_hints) for root in owned)
    return Footing(tuple(touched), nbytes, tuple(users))


def room_bytes(graph: Graph, peak_memory_bytes: int | None) -> int | None:
    """What a peak of ``peak_memory_bytes`` leaves for a program beside what it is given; None without a bound."""
    return None if peak_memory_bytes is None else max(peak_memory_bytes - given_bytes(graph), 0)


class LiveBytes:
    """Counts bytes alive as nodes run; ``now`` after the last node, ``peak`` the most during any node so far."""

    def __init__(self, ground: Footing) -> None:
        self._touched, self._nbytes = ground.touched, ground.nbytes
        self._left = list(ground.users)
        self._unborn = list(ground.nbytes)
        """Bytes of each storage that no node has touched yet; 0 afterwards."""
        self.now = 0
        self.peak = 0

    def need(self, position: int) -> int:
        """Bytes the node would allocate."""
        need = 0
        for storage in self._touched[position]:
            need += self._unborn[storage]
        return need

    def change(self, position: int) -> int:
        """Bytes alive after the node less bytes alive before it."""
        dying = sum(self._nbytes[s] for s in self._touched[position] if self._left[s] == 1)
        return self.need(position) - dying

    def step(self, position: int) -> None:
        """Run the node."""
        now, dead, left, unborn = self.now, 0, self._left, self._unborn
        for storage in self._touched[position]:
            now += unborn[storage]
            unborn[storage] = 0
            left[storage] -= 1
            if left[storage] == 0:
                dead += self._nbytes[storage]
        if now > self.peak:
            self.peak = now
        self.now = now - dead


def peak_bytes(ground: Footing, order: Sequence[int]) -> int:
    """Most bytes alive at once when the nodes run in ``order``."""
    live = LiveBytes(ground)
    for position in order:
        live.step(position)
    return live.peak
