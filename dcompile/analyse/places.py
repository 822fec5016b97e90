"""Where the values of a plan lie, as byte ranges, and whether those places make sense by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dcompile.analyse.alias import Strided, shared_storage, storage_roots, strided_views
from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import UnsafePlan
from dcompile.ir.graph import Graph, hint
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Pack, View
from dcompile.ir.symbolic import holds, is_check
from dcompile.ir.types import Size, Value
from dcompile.plan import ALIGNMENT, PARTS, Home, Plan, Storage

Space = tuple[str, str]
"""A separate address range: ``("arena", Storage.arena)``, or ``("storage", name)`` for memory allocated on its own."""


@dataclass(frozen=True)
class Bytes:
    """The half-open range ``[start, stop)`` of bytes in ``space``, inside ``storage``."""

    space: Space
    start: int
    stop: int
    storage: str

    def overlaps(self, other: Bytes) -> bool:
        return self.space == other.space and self.start < other.stop and other.start < self.stop

    def same_place(self, other: Bytes) -> bool:
        return (self.space, self.start, self.stop) == (other.space, other.start, other.stop)

    def __str__(self) -> str:
        where = f"{self.space[1]} arena" if self.space[0] == "arena" else self.storage
        return f"bytes [{self.start}, {self.stop}) of {where}"


@dataclass(frozen=True)
class Places:
    """All values of a plan on the byte level.

    Attributes:
        bytes_of: range of each tensor name, at the sizes given. A library output that aliases an operand counts as
            covering the operand.
        storage_bytes: range of each storage.
        roots: as ``alias.storage_roots``.
    """

    bytes_of: Mapping[str, Bytes]
    storage_bytes: Mapping[str, Bytes]
    roots: Mapping[str, str]


PLANNED_NODES = (Kernel, Extern, View, Pack, Start, Wait)
"""What a plan's graph may hold."""


def describe(node: Node | None, position: int | None) -> str:
    """``step 7 (Kernel t3) [train.py:41]`` for messages."""
    if node is None or position is None:
        return "the plan"
    names = ", ".join(item.name for item in node.defs) or ", ".join(node.operands)
    where = f" [{node.origin.source}]" if node.origin.source else ""
    return f"step {position} ({type(node).__name__} {names}){where}"


def unsafe(rule: str, where: str, what: str) -> UnsafePlan:
    """The error of a broken rule, ``"V2 at step 7 (...): ..."``."""
    return UnsafePlan(f"{rule} at {where}: {what}")


Sizes = Mapping[sympy.Symbol, int]
"""A value for each size symbol."""


def places(plan: Plan, sizes: Sizes | None = None) -> Places:
    """Resolve every place of ``plan`` for ``sizes``, by default the size hints.

    Raises:
        UnsafePlan: rule V11, a node kind, slot, storage or arena that cannot be right.
    """
    return _Resolver(plan, plan.graph.size_hints if sizes is None else sizes).run()


def unplanned(graph: Graph, sizes: Sizes) -> dict[str, Bytes]:
    """Where the tensors of ``graph`` lie relative to each other if every storage is a space of its own.

    The same relations as in ``places``; a view that is not strided covers what it is taken of.
    """
    views = strided_views(graph)
    found: dict[str, Bytes] = {}
    opaque: set[str] = set()

    def whole(value: Value) -> Bytes:
        return Bytes(("storage", value.name), 0, hint(value.nbytes, dict(sizes)), value.name)

    for item in graph.inputs:
        if isinstance(item, Value):
            found[item.name] = whole(item)
    starts: dict[str, Start] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            starts[node.pending.name] = node
        aliased = set(node.aliases) if isinstance(node, Extern) else set()
        tensors = {item.name: item for item in _tensors(node)}
        for name, shared in shared_storage(node, starts):
            if shared is None:
                found[name] = whole(tensors[name])
                continue
            strided = views[name] if isinstance(node, View) else None
            if strided is not None and strided.base not in opaque:
                found[name] = _part(tensors[name], strided, found[strided.base], sizes)
                continue
            found[name] = found[shared]
            if shared in aliased or shared in opaque:
                opaque.add(name)
    return found


def _part(value: Value, strided: Strided, base: Bytes, sizes: Sizes) -> Bytes:
    start = base.start + hint(strided.offset, dict(sizes)) * value.dtype.itemsize
    span = hint(Value(value.name, value.dtype, strided.shape, strided.stride).nbytes, dict(sizes))
    return Bytes(base.space, start, start + span, base.storage)


def _tensors(node: Node) -> tuple[Value, ...]:
    items = node.pending.results if isinstance(node, Start) else node.defs
    return tuple(item for item in items if isinstance(item, Value))


def admits(graph: Graph, sizes: Sizes) -> bool:
    """Whether the program makes sense for ``sizes``: no dimension below 1, every view inside its storage, every pack as
    large as its parts, every check passed. Guards, which a graph does not carry, exclude the rest."""
    known = dict(sizes)
    if any(is_check(node) and holds(node, sizes) is False for node in graph.nodes):
        return False
    values = {name: value for name, value in graph.defs.items() if isinstance(value, Value)}
    if any(hint(n, known) < 1 for v in values.values() for n in v.shape if not isinstance(n, int)):
        return False
    found = unplanned(graph, sizes)
    rooms = {name: place.stop for name, place in found.items() if place.storage == name}
    if any(place.start < 0 or place.stop > rooms[place.storage] for place in found.values()):
        return False
    packs = (node for node in graph.nodes if isinstance(node, Pack))
    return all(
        sum(hint(values[part].numel, known) for part in pack.parts) == hint(pack.out.numel, known) for pack in packs
    )


class _Resolver:
    def __init__(self, plan: Plan, sizes: Sizes) -> None:
        self.plan = plan
        self.graph: Graph = plan.graph
        self.hints = dict(sizes)
        self.views: dict[str, Strided | None] = {}
        self.bytes_of: dict[str, Bytes] = {}
        self.opaque: set[str] = set()  # names whose address inside their storage only the library knows

    def run(self) -> Places:
        for position, node in enumerate(self.graph.nodes):
            if not isinstance(node, PLANNED_NODES):
                raise unsafe("V11", describe(node, position), "a plan holds no such node")
        storages = {name: self.storage(name, storage) for name, storage in self.plan.storages.items()}
        self.views = strided_views(self.graph)
        for item in self.graph.inputs:
            if isinstance(item, Value):
                self.own(item, storages, None, None)
                home = self.plan.storages[self.plan.slots[item.name].storage].home
                if home is not Home.INPUT:
                    raise unsafe("V11", "the plan", f"input {item.name} lives in {home.value} storage")
        starts: dict[str, Start] = {}
        for position, node in enumerate(self.graph.nodes):
            if isinstance(node, Start):
                starts[node.pending.name] = node
            elif isinstance(node, Wait) and node.pending not in starts:
                raise unsafe("V7", describe(node, position), f"waits on {node.pending}, which nothing launched before")
            self.node(node, position, storages, starts)
        return Places(self.bytes_of, storages, storage_roots(self.graph))

    def storage(self, name: str, storage: Storage) -> Bytes:
        nbytes = hint(storage.nbytes, self.hints)
        if storage.name != name or nbytes < 0:
            raise unsafe("V11", "the plan", f"storage {name} is entered as {storage.name} with {nbytes} bytes")
        if storage.home not in PARTS:
            if storage.arena_offset is not None:
                raise unsafe("V11", "the plan", f"{storage.home.value} storage {name} has an arena offset")
            return Bytes(("storage", name), 0, nbytes, name)
        offset = storage.arena_offset
        if offset is None or offset < 0 or offset % ALIGNMENT:
            raise unsafe("V11", "the plan", f"arena storage {name} starts at {offset}, not a multiple of {ALIGNMENT}")
        if not isinstance(storage.nbytes, int):
            raise unsafe("V11", "the plan", f"arena storage {name} has a symbolic size, {storage.nbytes} bytes")
        room = self.plan.arena_bytes.get(storage.arena, 0)
        if offset + nbytes > room:
            raise unsafe("V11", "the plan", f"storage {name} ends at {offset + nbytes}, the arena at {room}")
        return Bytes(("arena", storage.arena), offset, offset + nbytes, name)

    def node(self, node: Node, position: int, storages: Mapping[str, Bytes], starts: dict[str, Start]) -> None:
        aliased = set(node.aliases) if isinstance(node, Extern) else set()
        tensors = {value.name: value for value in _tensors(node)}
        for name, shared in shared_storage(node, starts):
            if isinstance(node, Wait) and name in self.bytes_of:
                continue  # placed at its Start
            value = tensors[name]
            if shared is None:
                self.own(value, storages, node, position)
            elif shared in aliased or shared in self.opaque:
                self.opaque.add(name)
                self.same_storage(value, shared, node, position)
                self.bytes_of[name] = self.bytes_of[shared]
            elif isinstance(node, View):
                self.view(node, storages, position)
            else:
                place, target = self.place(value, value.nbytes, storages, node, position), self.bytes_of[shared]
                older = self.graph.value(shared)
                if (value.shape, value.dtype) != (older.shape, older.dtype):
                    text = f"{name} is the next version of {shared} but of another shape or element type"
                    raise unsafe("V11", describe(node, position), text)
                if place.storage != target.storage or (place.start != target.start and place.start != place.stop):
                    text = f"{name} is the next version of {shared} but lies in {place}, not in {target}"
                    raise unsafe("V11", describe(node, position), text)
                self.bytes_of[name] = target

    def own(self, value: Value, storages: Mapping[str, Bytes], node: Node | None, position: int | None) -> None:
        """The place of a value by its slot, shape and strides."""
        self.bytes_of[value.name] = self.place(value, value.nbytes, storages, node, position)

    def view(self, node: View, storages: Mapping[str, Bytes], position: int) -> None:
        strided = self.views[node.out.name]
        if strided is None:
            raise unsafe("V11", describe(node, position), f"{node.out.name} is no strided view of {node.base}")
        if strided.base in self.opaque:
            self.opaque.add(node.out.name)
            self.same_storage(node.out, node.base, node, position)
            self.bytes_of[node.out.name] = self.bytes_of[node.base]
            return
        span = Value(node.out.name, node.out.dtype, strided.shape, strided.stride).nbytes
        place = self.place(node.out, span, storages, node, position)
        base = self.bytes_of[strided.base]
        expected = base.start + hint(strided.offset, self.hints) * node.out.dtype.itemsize
        empty = place.start == place.stop
        if place.storage != base.storage or (place.start != expected and not empty):
            text = f"{node.out.name} lies in {place}; its map puts it at byte {expected} of {base.storage}'s space"
            raise unsafe("V11", describe(node, position), text)
        self.bytes_of[node.out.name] = place

    def place(
        self, value: Value, span: Size, storages: Mapping[str, Bytes], node: Node | None, position: int | None
    ) -> Bytes:
        slot = self.plan.slots.get(value.name)
        where = describe(node, position)
        if slot is None or slot.storage not in storages:
            raise unsafe("V11", where, f"{value.name} has no place" if slot is None else f"no storage {slot.storage}")
        room, offset, nbytes = storages[slot.storage], hint(slot.offset, self.hints), hint(span, self.hints)
        if offset < 0 or offset % value.dtype.itemsize or room.start + offset + nbytes > room.stop:
            text = (
                f"{value.name} takes {nbytes} bytes at {offset} of storage {slot.storage} of {room.stop - room.start}"
            )
            raise unsafe("V11", where, text)
        if self.plan.storages[slot.storage].device != value.device:
            raise unsafe("V11", where, f"{value.name} is on {value.device}, its storage is not")
        return Bytes(room.space, room.start + offset, room.start + offset + nbytes, slot.storage)

    def same_storage(self, value: Value, shared: str, node: Node, position: int) -> None:
        slot = self.plan.slots.get(value.name)
        if slot is None or slot.storage != self.bytes_of[shared].storage:
            text = (
                f"{value.name} shares the memory of {shared} but is placed {'nowhere' if slot is None else 'elsewhere'}"
            )
            raise unsafe("V11", describe(node, position), text)


__all__ = ["PLANNED_NODES", "Bytes", "Places", "Sizes", "Space", "admits", "describe", "places", "unplanned", "unsafe"]
