"""Who wrote which bytes last, while the steps of a graph run in order; what each step finds when it reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeAlias

from dcompile.analyse.bytemap import ByteMap
from dcompile.analyse.places import Bytes, Space
from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.types import Value

Found: TypeAlias = tuple[tuple[int, int, str | None], ...]
"""What a reader meets in a value: stretches of bytes counted from the value's first one, each with the name that was
written there last (None: nothing was); ascending, neighbours differ."""

StepKey: TypeAlias = Hashable
"""The same for a step in every order of one graph's nodes."""

RETURN: StepKey = "return"
"""Key of the graph's own reading of its outputs."""


class Contents:
    """Memory as the name of the last writer of each byte."""

    def __init__(self) -> None:
        self._spaces: dict[Space, ByteMap[str | None]] = {}

    def write(self, place: Bytes, writer: str) -> None:
        self._spaces.setdefault(place.space, ByteMap(None)).set(place.start, place.stop, writer)

    def read(self, place: Bytes) -> Found:
        if place.space not in self._spaces:
            return ((0, place.stop - place.start, None),) if place.start < place.stop else ()
        found: list[tuple[int, int, str | None]] = []
        for start, stop, writer in self._spaces[place.space].over(place.start, place.stop):
            begin = start - place.start
            if found and found[-1][2] == writer:
                begin = found.pop()[0]
            found.append((begin, stop - place.start, writer))
        return tuple(found)


def readings(node: Node) -> tuple[str, ...]:
    """Tensors whose memory the step reads; a target it writes into counts, since what is left of it is kept."""
    return () if isinstance(node, View | Wait) else node.operands


def writings(node: Node) -> Iterator[tuple[str, str]]:
    """(name that says where, name that is there afterwards) for each tensor the step writes.

    The results of a collective count as written by its launch; who may look before the wait is another rule.
    """
    if isinstance(node, View | Wait):
        return
    if isinstance(node, Start):
        results = (result.name for result in node.pending.results)
        if node.pending.in_place:
            yield from zip(node.sources, results, strict=True)
        else:
            yield from ((name, name) for name in results)
        return
    shared = aliases(node)
    yield from ((item.name, item.name) for item in node.defs if isinstance(item, Value) and item.name not in shared)


def aliases(node: Node) -> dict[str, str]:
    """Results that are an operand's memory and not written by the step, with what they show: the operand, or its next
    version if the same call writes the operand."""
    if isinstance(node, View):
        return {node.out.name: node.base}
    if not isinstance(node, Extern) or not node.aliases:
        return {}
    newer = {written: version.name for written, version in zip(node.writes, node.versions, strict=True)}
    pairs = zip(node.outs, node.aliases, strict=True)
    return {out.name: newer.get(a, a) for out, a in pairs if out is not None and a is not None}


def last_writers(graph: Graph) -> dict[str, str]:
    """For each tensor the name its bytes must carry when it is read by the graph's own names: itself, or what it is a
    view of."""
    writer = {name: name for name in graph.input_names}
    for node in graph.nodes:
        shown = aliases(node)
        for item in node.defs:
            if isinstance(item, Value) and item.name not in shown:
                writer[item.name] = item.name
        writer.update({name: writer[other] for name, other in shown.items()})
    return writer


def step_keys(graph: Graph) -> list[StepKey]:
    """A key for each node: the first name it defines; for library calls that define nothing what they call, and the
    how-manieth such call it is."""
    keys: list[StepKey] = []
    count: dict[tuple[object, ...], int] = {}
    for node in graph.nodes:
        if node.defs:
            keys.append(node.defs[0].name)
            continue
        call: tuple[object, ...] = (type(node),)
        if isinstance(node, Extern):
            call = (node.op, node.args, node.kwargs)
        count[call] = count.get(call, 0) + 1
        keys.append((call, count[call]))
    return keys


def what_reads_find(graph: Graph, bytes_of: Mapping[str, Bytes]) -> dict[tuple[StepKey, str], Found]:
    """Run ``graph`` in its own order; by step and operand what is found, outputs under ``RETURN``.

    Args:
        bytes_of: place of each tensor (see ``places.unplanned``).
    """
    contents = Contents()
    for name in graph.input_names:
        contents.write(bytes_of[name], name)
    found: dict[tuple[StepKey, str], Found] = {}
    for key, node in zip(step_keys(graph), graph.nodes, strict=True):
        for name in readings(node):
            found[key, name] = contents.read(bytes_of[name])
        for where, writer in writings(node):
            contents.write(bytes_of[where], writer)
    for name in graph.output_names:
        found[RETURN, name] = contents.read(bytes_of[name])
    return found


__all__ = [
    "RETURN",
    "Contents",
    "Found",
    "StepKey",
    "aliases",
    "last_writers",
    "readings",
    "step_keys",
    "what_reads_find",
    "writings",
]
