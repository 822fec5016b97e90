"""The proof that a plan is safe: its steps are run over a model of memory, byte range by byte range.

Rules (the id stands first in the message):

- V1  a step reads bytes that nothing has written
- V2  a step writes bytes that a collective in flight reads
- V3  a step touches the results of a collective in flight
- V4  a step touches the buffer of an in-place collective in flight
- V5  memory of a collective in flight is freed
- V6  a step reads a value whose bytes have been overwritten since, or an operand that has a newer version
- V7  a collective is not waited for exactly once, after its launch
- V8  a step uses freed memory, or memory is freed twice
- V9  the launches of one group are not in program order
- V10 an input is written without being declared mutated, freed, or reused; a returned tensor lies in the arena
- V11 a value has no proper place (see ``places``)
- V12 a step's results share bytes with each other or with operands where the step does not allow it
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dcompile.analyse.bytemap import ByteMap
from dcompile.analyse.places import Bytes, Places, Space, describe, places, unsafe
from dcompile.collectives.nodes import Start, Wait
from dcompile.collectives.rules import is_contiguous
from dcompile.errors import UnsafePlan
from dcompile.ir.graph import Graph, hint
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Pack, View
from dcompile.ir.types import Value
from dcompile.plan import Home, Plan

Hold = tuple[str, str]
"""A collective in flight and the rule that guards the bytes: ``V2`` (reads them), ``V3`` or ``V4`` (owns them)."""


def verify(plan: Plan, program: Graph | None = None) -> None:
    """Prove ``plan`` safe.

    Args:
        program: the graph before ordering; given, the launches of each group must keep its order (V9).

    Raises:
        UnsafePlan: naming rule, step, values, bytes and source line.
    """
    _Machine(plan, places(plan)).run()
    if program is not None:
        _check_launch_order(plan.graph, program)


def _check_launch_order(graph: Graph, program: Graph) -> None:
    expected, found = _launches(program), _launches(graph)
    for label in sorted(expected.keys() | found.keys()):
        before, now = expected.get(label, []), found.get(label, [])
        if before != now:
            raise unsafe("V9", "the plan", f"group {label} launches {', '.join(now)}; the program {', '.join(before)}")


def _launches(graph: Graph) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            found.setdefault(node.group.label, []).append(node.pending.name)
    return found


class _Machine:
    """Memory while the plan runs: who wrote each byte last, which collectives hold it, what is freed."""

    def __init__(self, plan: Plan, where: Places) -> None:
        self.plan, self.graph, self.where = plan, plan.graph, where
        self.content: dict[Space, ByteMap[str | None]] = {}
        self.holds: dict[Space, ByteMap[frozenset[Hold]]] = {}
        self.flying: dict[str, Start] = {}
        self.freed: set[str] = set()
        self.written: set[str] = set()
        self.newer: dict[str, str] = {}
        self.view_base = {node.out.name: node.base for node in plan.graph.nodes if isinstance(node, View)}
        self.at = "the start"

    def run(self) -> None:
        for name in self.graph.input_names:
            self.put(name)
        for position, node in enumerate(self.graph.nodes):
            self.at = describe(node, position)
            self.step(node)
            for storage in self.plan.frees.get(position, ()):
                self.free(storage)
        self.at = "the end"
        if self.flying:
            raise self.broken("V7", f"{', '.join(sorted(self.flying))} launched but never waited for")
        for name in sorted(self.graph.output_names):
            if self.plan.storages[self.where.bytes_of[name].storage].home is Home.ARENA:
                raise self.broken("V10", f"returned tensor {name} lies in the arena")
            self.check_read(name)

    def broken(self, rule: str, what: str) -> UnsafePlan:
        return unsafe(rule, self.at, what)

    def step(self, node: Node) -> None:
        if isinstance(node, View):
            self.check_alive(node.base)
            return
        if isinstance(node, Wait):
            self.wait(node)
            return
        made = _made(node)
        for name in node.operands:
            self.check_read(name)
        for name in dict.fromkeys((*node.mutates, *made)):
            self.check_write(name)
        self.check_sharing(node, made)
        for name in made:
            self.put(name)
        self.supersede(node)
        if isinstance(node, Start):
            self.launch(node)

    def check_alive(self, name: str) -> None:
        if (storage := self.where.bytes_of[name].storage) in self.freed:
            raise self.broken("V8", f"{name} is used after its storage {storage} was freed")

    def check_read(self, name: str) -> None:
        self.check_alive(name)
        mine, root = self.where.bytes_of[name], self.where.roots[name]
        self.check_holds("reads", name, mine, owned_only=True)
        stale = name
        while stale in self.view_base and stale not in self.newer:
            stale = self.view_base[stale]
        if stale in self.newer:
            raise self.broken(
                "V6", f"reads {name}, but {stale} was overwritten by its next version {self.newer[stale]}"
            )
        for start, stop, content in self.contents(mine).over(mine.start, mine.stop):
            part = Bytes(mine.space, start, stop, mine.storage)
            if root not in self.written or content is None:
                raise self.broken("V1", f"reads {name}, but nothing has written {part}")
            if content != root:
                raise self.broken("V6", f"reads {name}, but {part} hold {content} since")

    def check_write(self, name: str) -> None:
        self.check_alive(name)
        mine = self.where.bytes_of[name]
        self.check_holds("writes", name, mine, owned_only=False)
        if self.plan.storages[mine.storage].home is Home.INPUT and self.where.roots[name] not in self.graph.input_names:
            raise self.broken("V10", f"{name} takes the memory of input storage {mine.storage}")

    def check_holds(self, verb: str, name: str, mine: Bytes, owned_only: bool) -> None:
        if mine.space not in self.holds:
            return
        for start, stop, holds in self.holds[mine.space].over(mine.start, mine.stop):
            for pending, rule in sorted(holds, key=lambda hold: (hold[1] == "V2", hold)):
                if owned_only and rule == "V2":
                    continue
                part = Bytes(mine.space, start, stop, mine.storage)
                raise self.broken(rule, f"{verb} {name}, but {part} {_USE[rule]} {pending}, which is in flight")

    def check_sharing(self, node: Node, made: tuple[str, ...]) -> None:
        """V12: results against each other and against operands in other storages."""
        roots, spots = self.where.roots, self.where.bytes_of
        for n, name in enumerate(made):
            for other in made[:n]:
                if spots[name].overlaps(spots[other]) and not _one_storage(node, roots[name] == roots[other]):
                    raise self.broken("V12", f"{other} and {name} are made by one step and share {spots[name]}")
            for operand in node.operands:
                over = roots[operand] != roots[name] and spots[name].overlaps(spots[operand])
                if over and not self.may_share(node, name, operand):
                    raise self.broken("V12", f"{name} is written over {operand} ({spots[operand]}) while it is read")

    def may_share(self, node: Node, name: str, operand: str) -> bool:
        """Whether the step may make ``name`` on top of ``operand``: in-place pairs, placed parts."""
        mine, theirs = self.where.bytes_of[name], self.where.bytes_of[operand]
        if isinstance(node, Kernel):
            return (name, operand) in node.inplace and mine.same_place(theirs)
        if isinstance(node, Pack) and is_contiguous(self.graph.value(operand)):
            offset = mine.start
            for part in node.parts:
                if part == operand and theirs.start == offset:
                    return True
                value = self.graph.value(part)
                offset += hint(value.numel, self.graph.size_hints) * value.dtype.itemsize
        return False

    def supersede(self, node: Node) -> None:
        if isinstance(node, Kernel):
            pairs = [(t, out.name) for out, t in zip(node.outs, node.targets, strict=False) if t is not None]
        elif isinstance(node, Extern):
            pairs = [(w, v.name) for w, v in zip(node.writes, node.versions, strict=True)]
        elif isinstance(node, Start) and node.pending.in_place:
            pairs = [(s, r.name) for s, r in zip(node.sources, node.pending.results, strict=True)]
        else:
            pairs = []
        self.newer.update(pairs)

    def launch(self, start: Start) -> None:
        self.flying[start.pending.name] = start
        for hold, name in _holds(start):
            mine = self.where.bytes_of[name]
            held = self.holds.setdefault(mine.space, ByteMap(frozenset()))
            held.update(mine.start, mine.stop, partial(frozenset.union, frozenset((hold,))))

    def wait(self, node: Wait) -> None:
        start = self.flying.pop(node.pending, None)
        if start is None:
            raise self.broken("V7", f"{node.pending} is waited for a second time")
        names, results = [out.name for out in node.outs], [result.name for result in start.pending.results]
        if names != results:
            raise self.broken(
                "V7", f"the wait gives {', '.join(names)}, the launch of {node.pending} {', '.join(results)}"
            )
        for hold, name in _holds(start):
            mine = self.where.bytes_of[name]
            self.holds[mine.space].update(mine.start, mine.stop, partial(_without, hold))

    def free(self, storage: str) -> None:
        if storage not in self.plan.storages or self.plan.storages[storage].home is Home.ARENA:
            raise self.broken("V8", f"frees {storage}, which is no storage of its own")
        if self.plan.storages[storage].home is Home.INPUT:
            raise self.broken("V10", f"frees input storage {storage}")
        if storage in self.freed:
            raise self.broken("V8", f"frees {storage} a second time")
        mine = self.where.storage_bytes[storage]
        if mine.space in self.holds:
            for _, _, holds in self.holds[mine.space].over(mine.start, mine.stop):
                for pending, _ in sorted(holds):
                    raise self.broken("V5", f"frees {storage}, which {pending} uses in flight")
        self.freed.add(storage)

    def put(self, name: str) -> None:
        """``name`` has been written: its bytes hold its storage's content."""
        mine, root = self.where.bytes_of[name], self.where.roots[name]
        self.written.add(root)
        self.contents(mine).set(mine.start, mine.stop, root)

    def contents(self, mine: Bytes) -> ByteMap[str | None]:
        return self.content.setdefault(mine.space, ByteMap(None))


_USE = {"V2": "are read by", "V3": "are the result of", "V4": "are the in-place buffer of"}


def _without(hold: Hold, holds: frozenset[Hold]) -> frozenset[Hold]:
    return holds - {hold}


def _made(node: Node) -> tuple[str, ...]:
    """Tensors a step writes: what it defines, library outputs that alias an operand left out; for a launch the results
    that come into being, in place the sources."""
    if isinstance(node, Start):
        return node.sources if node.pending.in_place else tuple(result.name for result in node.pending.results)
    if isinstance(node, Extern) and node.aliases:
        fresh = [out.name for out, a in zip(node.outs, node.aliases, strict=True) if out is not None and a is None]
        return (*fresh, *(version.name for version in node.versions))
    return tuple(item.name for item in node.defs if isinstance(item, Value))


def _one_storage(node: Node, same_root: bool) -> bool:
    """Whether two results of one step may share bytes: kernels and library calls may return several versions of one
    storage, a collective may not."""
    return same_root and not isinstance(node, Start)


def _holds(start: Start) -> Iterator[tuple[Hold, str]]:
    """What a collective holds while in flight."""
    name = start.pending.name
    if start.pending.in_place:
        for source in dict.fromkeys(start.sources):
            yield (name, "V4"), source
        return
    for source in dict.fromkeys(start.sources):
        yield (name, "V2"), source
    for result in start.pending.results:
        yield (name, "V3"), result.name


__all__ = ["verify"]
