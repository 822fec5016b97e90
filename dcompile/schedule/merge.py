"""Merging collectives: which ones may travel together, and the graph in which they do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from dcompile.analyse.dependence import predecessors
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.index import as_expr, as_size, flatten_index, symbol
from dcompile.ir.nodes import Node, Pack, View
from dcompile.ir.types import Origin, Size, Value, contiguous_stride
from dcompile.plan import ALIGNMENT


@dataclass(frozen=True)
class Member:
    """A collective that may be merged.

    Attributes:
        start, wait: positions of its two ends.
        key: what members of one bucket have in common.
        available: position of the last node its launch needs, -1 if none.
        nbytes: payload at the size hints.
        held: bytes of sources and results, in use from launch to wait.
        needs: bit mask over the members (in the order given) whose results its launch depends on.
        number: its own place in that order.
    """

    start: int
    wait: int
    key: tuple[object, ...]
    available: int
    nbytes: int
    held: int = 0
    needs: int = 0
    number: int = 0


Bucket = tuple[Member, ...]


def true_predecessors(graph: Graph) -> list[tuple[int, ...]]:
    """Direct predecessors without the launch order of a group, which merging chooses anew (on all ranks alike)."""
    nodes = graph.nodes
    return [
        tuple(sorted(p for p in before if not (isinstance(nodes[at], Start) and isinstance(nodes[p], Start))))
        for at, before in enumerate(predecessors(graph))
    ]


def depended_on(before: Sequence[tuple[int, ...]], marks: dict[int, int]) -> list[int]:
    """For each node the union of ``marks`` (bit masks by position) over everything it depends on."""
    found: list[int] = []
    for needs in before:
        mask = 0
        for other in needs:
            mask |= found[other] | marks.get(other, 0)
        found.append(mask)
    return found


def merge(graph: Graph, before: Sequence[tuple[int, ...]], buckets: Sequence[Bucket]) -> tuple[Graph, list[Bucket]]:
    """``graph`` with each bucket of two or more members as one collective.

    The launch stands right behind the last node it needs, the wait before its first reader; everything else keeps its
    order as far as that allows. A bucket that would have to wait for itself is left as it was.

    Args:
        before: ``true_predecessors(graph)``.

    Returns:
        the new graph and the buckets that could not be merged.
    """
    kept = [bucket for bucket in buckets if len(bucket) > 1]
    refused: list[Bucket] = []
    while True:
        units = _Units(graph, before, kept)
        order = units.order()
        if order is not None:
            break
        refused.append(kept.pop(units.stuck_bucket()))
    if not kept:
        return graph, refused
    builder = _Builder(graph)
    made: dict[int, tuple[Node, ...]] = {}
    for bucket in kept:
        launch, landing = builder.bucket(bucket)
        made[bucket[0].start], made[bucket[0].wait] = launch, landing
    nodes = [node for unit in order for node in made.get(unit, (graph.nodes[unit],))]
    return graph.with_nodes(tuple(nodes)).check(), refused


class _Units:
    """Nodes to be placed: the launches (and waits) of a bucket are one unit, named by the position of its first."""

    def __init__(self, graph: Graph, before: Sequence[tuple[int, ...]], buckets: Sequence[Bucket]) -> None:
        self.unit = list(range(len(graph.nodes)))
        self.buckets = buckets
        for bucket in buckets:
            for member in bucket:
                self.unit[member.start] = bucket[0].start
                self.unit[member.wait] = bucket[0].wait
        self.needs: dict[int, set[int]] = {unit: set() for unit in self.unit}
        self.after: dict[int, set[int]] = {unit: set() for unit in self.unit}
        for position, found in enumerate(before):
            for other in found:
                if position != other:
                    self.needs[self.unit[position]].add(self.unit[other])
                    self.after[self.unit[other]].add(self.unit[position])
        self.key: dict[int, tuple[int, int, int]] = {unit: (unit, 0, 0) for unit in self.needs}
        for bucket in buckets:
            readers = self.after[bucket[0].wait]
            last = max(member.start for member in bucket)
            self.key[bucket[0].start] = (max(member.available for member in bucket), 1, last)
            self.key[bucket[0].wait] = (min(readers, default=len(self.unit)), -1, 0)
        self.left: set[int] = set()

    def order(self) -> list[int] | None:
        """Units by key as far as dependences allow; None if some depend on themselves (they stay in ``left``)."""
        missing = {unit: len(needs) for unit, needs in self.needs.items()}
        ready = [(self.key[unit], unit) for unit, count in missing.items() if count == 0]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            unit = heapq.heappop(ready)[1]
            order.append(unit)
            for other in self.after[unit]:
                missing[other] -= 1
                if missing[other] == 0:
                    heapq.heappush(ready, (self.key[other], other))
        self.left = set(self.needs) - set(order)
        return None if self.left else order

    def stuck_bucket(self) -> int:
        """Index of the last bucket among the units that could not be placed."""
        return max(n for n, b in enumerate(self.buckets) if b[0].start in self.left or b[0].wait in self.left)


class _Builder:
    """Makes the nodes of merged collectives under names the graph does not use."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 0

    def bucket(self, bucket: Bucket) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """Nodes at the launch and nodes at the wait."""
        starts = [node for member in bucket if isinstance(node := self.graph.nodes[member.start], Start)]
        waits = [node for member in bucket if isinstance(node := self.graph.nodes[member.wait], Wait)]
        origin = reduce(Origin.__or__, (start.origin for start in starts))
        name = self._name()
        if starts[0].kind is Kind.ALL_REDUCE:
            return self._packed(name, starts, waits, origin)
        outs = tuple(out for wait in waits for out in wait.outs)
        start = Start(
            pending=Pending(f"{name}_flight", outs, in_place=False),
            kind=starts[0].kind,
            group=starts[0].group,
            sources=tuple(source for start in starts for source in start.sources),
            reduction=starts[0].reduction,
            root=starts[0].root,
            via=starts[0].via,
            origin=origin,
        )
        return (start,), (Wait(outs=outs, pending=start.pending.name, origin=origin),)

    def _packed(
        self, name: str, starts: Sequence[Start], waits: Sequence[Wait], origin: Origin
    ) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """Pack, reduce in place, and views of the result under the old names."""
        pairs = [
            (source, out)
            for start, wait in zip(starts, waits, strict=True)
            for source, out in zip(start.sources, wait.outs, strict=True)
        ]
        pairs.sort(key=lambda pair: not _keeps_alignment(pair[1]))
        total: Size = 0
        views: list[Node] = []
        flat = f"{name}_reduced"
        for _, out in pairs:
            views.append(_slice(out, flat, total, origin))
            total = as_size(total + out.numel)
        first = pairs[0][1]
        packed = Value(name, first.dtype, (total,), (1,), first.device)
        reduced = Value(flat, first.dtype, (total,), (1,), first.device)
        start = Start(
            pending=Pending(f"{name}_flight", (reduced,), in_place=True),
            kind=Kind.ALL_REDUCE,
            group=starts[0].group,
            sources=(name,),
            reduction=starts[0].reduction,
            origin=origin,
        )
        pack = Pack(out=packed, parts=tuple(source for source, _ in pairs), origin=origin)
        return (pack, start), (Wait(outs=(reduced,), pending=start.pending.name, origin=origin), *views)

    def _name(self) -> str:
        while True:
            name = f"bucket{self.count}"
            self.count += 1
            if not any(name + end in self.graph.defs for end in ("", "_flight", "_reduced")):
                return name


def _keeps_alignment(value: Value) -> bool:
    """Whether the next part begins as well aligned as this one: such parts come first, the odd ones behind them."""
    nbytes = as_size(value.numel * value.dtype.itemsize)
    return isinstance(nbytes, int) and nbytes % ALIGNMENT == 0


def _slice(out: Value, flat: str, offset: Size, origin: Origin) -> View:
    axes = tuple((symbol(f"i{n}"), size) for n, size in enumerate(out.shape))
    address = as_expr(offset) + flatten_index(tuple(var for var, _ in axes), contiguous_stride(out.shape))
    return View(out=out, base=flat, axes=axes, index=(address,), origin=origin)
