"""The proof that a plan is safe: its steps are run over a model of memory, byte range by byte range.

Rules (the id stands first in the message):

- V1  a step reads bytes that nothing has written
- V2  a step writes bytes that a collective in flight reads
- V3  a step touches the results of a collective in flight
- V4  a step touches the buffer of an in-place collective in flight
- V5  memory of a collective in flight is freed
- V6  a step reads an operand that has a newer version, or finds other versions in its bytes than in the program
- V7  a collective is not waited for exactly once, after its launch
- V8  a step uses freed memory, or memory is freed twice
- V9  the launches of one group are not in program order
- V10 an input is written without being declared mutated, freed, or reused; a returned tensor lies in the arena
- V11 a value has no proper place (see ``places``)
- V12 a step's results share bytes with each other or with operands where the step does not allow it
- V13 calls with effects are not in program order, or a step passes a barrier
- V14 the plan's steps, inputs or outputs are not the program's
- V15 a storage takes the memory of an input that is returned or read later, or not in place
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import sympy

from dcompile.analyse.bytemap import ByteMap
from dcompile.analyse.contents import (
    RETURN,
    Contents,
    Found,
    StepKey,
    last_writers,
    readings,
    step_keys,
    what_reads_find,
    writings,
)
from dcompile.analyse.places import Bytes, Places, Sizes, Space, admits, describe, places, unplanned, unsafe
from dcompile.analyse.same_steps import check_steps
from dcompile.collectives.nodes import Start, Wait
from dcompile.collectives.rules import is_contiguous
from dcompile.errors import UnsafePlan
from dcompile.ir.graph import Graph, hint
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Pack, View
from dcompile.plan import PARTS, Home, Plan

Hold = tuple[str, str]
"""A collective in flight and the rule that guards the bytes: ``V2`` (reads them), ``V3`` or ``V4`` (owns them)."""


def verify(plan: Plan, program: Graph | None = None) -> None:
    """Prove ``plan`` safe.

    Every byte carries the name that was written there last. Without ``program`` a read must find the name it reads (or
    what that is a view of) in all its bytes. A base that is read after a write through a view of it has no new name,
    so this refuses some safe plans. With ``program`` each read must find exactly what it finds when the program runs in
    its own order, each storage in memory of its own: that accepts every legal order, and every other one it accepts
    differs from program order only for accesses that share no byte. A view counts as all bytes from its first to its
    last element.

    Symbolic sizes are proven at the size hints, and tried at two other sizes of every symbol (``other_sizes``); the
    proof says nothing about further sizes.

    Args:
        program: the graph before ordering, the same nodes; given, V9, V13 and V14 are checked as well.

    Raises:
        UnsafePlan: naming rule, step, values, bytes and source line.
    """
    if program is not None:
        check_steps(plan.graph, program)
    hints = plan.graph.size_hints
    check_donors(plan)
    _prove(plan, program, hints)
    for sizes in other_sizes(plan.graph):
        try:
            _prove(plan, program, sizes)
        except UnsafePlan as error:
            raise UnsafePlan(f"{error} (with {', '.join(f'{s} = {n}' for s, n in sizes.items())})") from None


def _prove(plan: Plan, program: Graph | None, sizes: Sizes) -> None:
    expected = None if program is None else what_reads_find(program, unplanned(program, sizes))
    _Machine(plan, places(plan, sizes), sizes, expected).run()


def other_sizes(graph: Graph) -> list[dict[sympy.Symbol, int]]:
    """Two more values for the size symbols, where the program admits them; none if all sizes are static.

    Multiples of the hints, so that what was divisible stays so: first all doubled, which keeps proportions between
    symbols, then each with a factor of its own, which breaks those that held by chance.
    """
    hints = graph.size_hints
    if not hints:
        return []
    doubled = {symbol: 2 * max(n, 1) for symbol, n in hints.items()}
    apart = {symbol: (3 + k) * max(n, 1) for k, (symbol, n) in enumerate(hints.items())}
    return [sizes for sizes in (doubled, apart) if admits(graph, sizes)]


def check_donors(plan: Plan) -> None:
    """V15: each input that a storage takes over is last read, at the same bytes, by the kernel that first writes it.

    Raises:
        UnsafePlan: it is not.
    """
    given = {storage.donor: storage for storage in plan.storages.values() if storage.donor is not None}
    if not given:
        return
    if len(given) < sum(storage.donor is not None for storage in plan.storages.values()):
        raise unsafe("V15", "the plan", "two storages take the memory of one input")
    graph, where = plan.graph, places(plan)
    in_place = {
        (where.bytes_of[out].storage, where.bytes_of[operand].storage, position)
        for position, node in enumerate(graph.nodes)
        if isinstance(node, Kernel)
        for out, operand in node.inplace
    }
    lives = storage_lives(plan, where)
    for donor, storage in given.items():
        taken, first = lives.get(donor, (0, -1))[1], lives[storage.name][0]
        home = plan.storages[donor].home if donor in plan.storages else None
        same = home is Home.INPUT and plan.storages[donor].nbytes == storage.nbytes and storage.home is Home.FRESH
        if not same or taken > first or (storage.name, donor, first) not in in_place:
            raise unsafe("V15", describe(graph.nodes[first], first), f"{storage.name} takes the memory of {donor}")


def storage_lives(plan: Plan, where: Places) -> dict[str, tuple[int, int]]:
    """First and last position at which each storage is touched; the length of the program if it is returned."""
    found: dict[str, tuple[int, int]] = {}
    starts = {node.pending.name: node for node in plan.graph.nodes if isinstance(node, Start)}

    def touch(name: str, position: int) -> None:
        if name in where.bytes_of:
            storage = where.bytes_of[name].storage
            found[storage] = (found.get(storage, (position, position))[0], position)

    for position, node in enumerate(plan.graph.nodes):
        sources = starts[node.pending].sources if isinstance(node, Wait) else ()
        for name in (*node.operands, *sources, *(item.name for item in node.defs)):
            touch(name, position)
    for name in plan.graph.output_names:
        touch(name, len(plan.graph.nodes))
    return found


class _Machine:
    """Memory while the plan runs: who wrote each byte last, which collectives hold it, what is freed."""

    def __init__(
        self, plan: Plan, where: Places, sizes: Sizes, expected: Mapping[tuple[StepKey, str], Found] | None
    ) -> None:
        self.plan, self.graph, self.where, self.sizes, self.expected = plan, plan.graph, where, dict(sizes), expected
        self.content = Contents()
        self.writer = last_writers(plan.graph)
        self.holds: dict[Space, ByteMap[frozenset[Hold]]] = {}
        self.flying: dict[str, Start] = {}
        self.freed: set[str] = set()
        self.written: set[str] = set()
        self.newer: dict[str, str] = {}
        self.view_base = {node.out.name: node.base for node in plan.graph.nodes if isinstance(node, View)}
        self.at = "the start"

    def run(self) -> None:
        for name in self.graph.input_names:
            self.put(name, name)
        for position, (key, node) in enumerate(zip(step_keys(self.graph), self.graph.nodes, strict=True)):
            self.at = describe(node, position)
            self.step(key, node)
            for storage in self.plan.frees.get(position, ()):
                self.free(storage)
        self.at = "the end"
        if self.flying:
            raise self.broken("V7", f"{', '.join(sorted(self.flying))} launched but never waited for")
        for name in sorted(self.graph.output_names):
            if self.plan.storages[self.where.bytes_of[name].storage].home in PARTS:
                raise self.broken("V10", f"returned tensor {name} lies in the arena")
            self.check_read(RETURN, name)

    def broken(self, rule: str, what: str) -> UnsafePlan:
        return unsafe(rule, self.at, what)

    def step(self, key: StepKey, node: Node) -> None:
        if isinstance(node, View):
            self.check_alive(node.base)
            return
        if isinstance(node, Wait):
            self.wait(node)
            return
        made = _made(node)
        for name in readings(node):
            self.check_read(key, name)
        for name in dict.fromkeys((*node.mutates, *made)):
            self.check_write(name)
        self.check_sharing(node, made)
        for name, writer in writings(node):
            self.put(name, writer)
        self.supersede(node)
        if isinstance(node, Start):
            self.launch(node)

    def check_alive(self, name: str) -> None:
        if (storage := self.where.bytes_of[name].storage) in self.freed:
            raise self.broken("V8", f"{name} is used after its storage {storage} was freed")

    def check_read(self, key: StepKey, name: str) -> None:
        self.check_alive(name)
        self.check_holds("reads", name, self.where.bytes_of[name], owned_only=True)
        stale = name
        while stale in self.view_base and stale not in self.newer:
            stale = self.view_base[stale]
        if stale in self.newer:
            raise self.broken(
                "V6", f"reads {name}, but {stale} was overwritten by its next version {self.newer[stale]}"
            )
        self.check_content(key, name)

    def check_content(self, key: StepKey, name: str) -> None:
        """Every byte of ``name`` holds what it must."""
        mine, writer = self.where.bytes_of[name], self.writer[name]
        found = self.content.read(mine)
        if self.expected is not None:
            expected = self.expected[key, name]
        else:
            expected = ((0, mine.stop - mine.start, writer),) if mine.start < mine.stop else ()
        if writer in self.written and found == expected:
            return
        for start, stop, now in found:
            part = Bytes(mine.space, mine.start + start, mine.start + stop, mine.storage)
            if writer not in self.written or now is None:
                raise self.broken("V1", f"reads {name}, but nothing has written {part}")
            for low, high, wanted in expected:
                if wanted != now and low < stop and start < high:
                    part = replace(part, start=mine.start + max(low, start), stop=mine.start + min(high, stop))
                    raise self.broken("V6", f"reads {name}, but {part} hold {now}, not {wanted}")

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
                offset += hint(value.numel, self.sizes) * value.dtype.itemsize
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
        if storage not in self.plan.storages or self.plan.storages[storage].home in PARTS:
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

    def put(self, name: str, writer: str) -> None:
        """The place of ``name`` has been written and holds ``writer``."""
        self.written.add(writer)
        self.content.write(self.where.bytes_of[name], writer)


_USE = {"V2": "are read by", "V3": "are the result of", "V4": "are the in-place buffer of"}


def _without(hold: Hold, holds: frozenset[Hold]) -> frozenset[Hold]:
    return holds - {hold}


def _made(node: Node) -> tuple[str, ...]:
    """Tensors a step writes: what it defines, library outputs that alias an operand left out; for a launch the results
    that come into being, in place the sources."""
    if isinstance(node, Start):
        return node.sources if node.pending.in_place else tuple(result.name for result in node.pending.results)
    return tuple(name for name, _ in writings(node))


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


__all__ = ["other_sizes", "verify"]
