"""Memory planning: a storage for every tensor, and for every storage its owner, its bytes and the time it is in use.

Values that share memory by definition (views, versions, in-place collectives) share a storage already
(``analyse.alias``). Two decisions join further storages: a part of a ``Pack`` that is dead afterwards is computed in
its final position, and a kernel's result may take the bytes of an operand that dies in it. Is that operand an input of
a backward graph, something saved for it, the program looks when it runs whether somebody else holds it. What is left is
placed in one block per device by ``offsets.assign_offsets``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import sympy

from dcompile.analyse.alias import Strided, shared_storage, storage_roots, strided_views
from dcompile.analyse.context import Context
from dcompile.analyse.lifetime import lifetimes
from dcompile.collectives.nodes import Kind, Start, Via
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import as_size
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Pack, View
from dcompile.ir.types import Size, Value, contiguous_stride
from dcompile.plan import PARTS, Home, Plan, Prediction, Slot, Storage
from dcompile.schedule.links import carried_bytes
from dcompile.schedule.offsets import Request, aligned, assign_offsets

STAGE = "plan_memory"

LEAST_DONATED_BYTES = 2**20
"""Smaller inputs are not worth asking who holds them, which takes a microsecond."""


@dataclass
class _Block:
    """A storage while it is planned; ``first`` and ``last`` are node positions, both in use.

    ``group``: label of the group that maps SHARED memory.
    """

    name: str
    home: Home
    nbytes: Size
    device: str
    first: int
    last: int
    group: str = ""
    host: tuple[str, Size] | None = None
    """The block it was joined to and its first byte in there."""
    donor: str | None = None
    """The input whose memory it may take."""

    def storage(self, offset: int | None = None) -> Storage:
        """As it stands in the plan."""
        return Storage(self.name, self.home, self.nbytes, self.device, offset, self.group, self.donor)


@dataclass
class _Planner:
    graph: Graph
    ctx: Context
    roots: dict[str, str]
    strided: dict[str, Strided | None]
    blocks: dict[str, _Block]
    within: dict[str, Size] = field(default_factory=dict)
    """First byte of each value in the storage of its root."""

    def leader(self, root: str) -> tuple[_Block, Size]:
        """The block that ``root`` lies in after joining, and its first byte there."""
        block, offset = self.blocks[root], 0
        while block.host is not None:
            root, step = block.host
            block, offset = self.blocks[root], offset + step
        return block, as_size(offset)

    def place(self, name: str) -> tuple[_Block, Size]:
        """The block a value lies in and its first byte there."""
        block, offset = self.leader(self.roots[name])
        return block, as_size(offset + self.within[name])

    def say(self, subject: str, decision: str, reason: str) -> None:
        self.ctx.verdict(STAGE, subject, decision, reason)


def plan_memory(graph: Graph, ctx: Context, prediction: Prediction | None = None) -> Plan:
    """Give every tensor of an ordered graph its place.

    Args:
        graph: nodes in execution order.
        ctx: receives a verdict for every pack, every possible in-place kernel result and every arena.
        prediction: the schedule's times, kept in the plan as they are.

    Raises:
        CompilerBug: a view that is no strided alias of its base.
    """
    planner = _Planner(graph, ctx, storage_roots(graph), strided_views(graph), {})
    _make_blocks(planner)
    _locate(planner)
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Pack):
            _place_parts(planner, position, node)
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Kernel) and node.inplace:
            _reuse_operands(planner, position, node)
    offsets, arena_bytes = _arenas(planner)
    names = _storage_names(planner)
    storages = {
        names[block.name]: replace(block.storage(offsets.get(block.name)), name=names[block.name])
        for block in planner.blocks.values()
        if block.host is None
    }
    slots = {}
    for name in planner.within:
        block, offset = planner.place(name)
        slots[name] = Slot(names[block.name], offset)
    return Plan(
        graph=graph,
        slots=slots,
        storages=storages,
        frees=_frees(planner, names),
        arena_bytes=arena_bytes,
        peak_bytes=_peak_bytes(planner, arena_bytes),
        prediction=prediction,
        verdicts=tuple(ctx.verdicts),
    )


def _make_blocks(planner: _Planner) -> None:
    """One block for each root, with its home and lifetime."""
    graph, roots = planner.graph, planner.roots
    lives = lifetimes(graph)
    escaping = {roots[name] for name in graph.output_names}
    from_library = {
        out.name
        for node in graph.nodes
        if isinstance(node, Extern) and node.out_op is None
        for out in node.outs
        if out is not None and roots[out.name] == out.name
    }
    landings = _landings(graph)
    for root in dict.fromkeys(roots.values()):
        value = graph.value(root)
        nbytes = as_size(value.nbytes)
        if root in landings:
            home = Home.SHARED
            if root in escaping or not isinstance(nbytes, int):
                raise CompilerBug(f"{STAGE}: {root} lands in shared memory but is returned or of unknown size")
        elif root in graph.input_names:
            home = Home.INPUT
        elif root in from_library:
            home = Home.LIBRARY
        elif root in escaping or not isinstance(nbytes, int):
            home = Home.FRESH
        else:
            home = Home.ARENA
        life = lives[root]
        group = landings.get(root, "")
        planner.blocks[root] = _Block(root, home, nbytes, value.device, life.first, life.last, group)


def _landings(graph: Graph) -> dict[str, str]:
    """Results that other ranks write themselves, with the label of their group."""
    return {
        result.name: node.group.label
        for node in graph.nodes
        if isinstance(node, Start) and node.via is Via.PEERS
        for result in node.pending.results
    }


def _locate(planner: _Planner) -> None:
    """Fill ``within``: where each value begins in its root's storage."""
    graph, within = planner.graph, planner.within
    for name in graph.input_names:
        within[name] = 0
    starts = {node.pending.name: node for node in graph.nodes if isinstance(node, Start)}
    for node in graph.nodes:
        earlier = {name: shared for name, shared in shared_storage(node, starts) if shared is not None}
        for defined in node.defs:
            if not isinstance(defined, Value):
                continue
            if isinstance(node, View):
                alias = planner.strided[defined.name]
                if alias is None:
                    raise CompilerBug(
                        f"{STAGE}: view {defined.name} of {node.base} ({node.origin.source or 'unknown line'}) is not "
                        "a strided alias of its base; it must be materialised before memory is planned"
                    )
                step = alias.offset * graph.value(alias.base).dtype.itemsize
                within[defined.name] = as_size(within[alias.base] + step)
            elif defined.name in earlier:
                within[defined.name] = _clip(planner, defined, within[earlier[defined.name]])
            else:
                within[defined.name] = 0


def _clip(planner: _Planner, value: Value, offset: Size) -> Size:
    """``offset``, or 0 where the value would reach past its storage: a library view may begin before its operand."""
    hints = planner.graph.size_hints
    room = hint(planner.blocks[planner.roots[value.name]].nbytes, hints)
    return offset if hint(as_size(value.nbytes), hints) + hint(offset, hints) <= room else 0


def _place_parts(planner: _Planner, position: int, pack: Pack) -> None:
    """Compute the parts that are dead after ``pack`` in their final position."""
    host = planner.blocks[pack.out.name]
    offset: Size = 0
    placed, copied = 0, []
    for part in pack.parts:
        value = planner.graph.value(part)
        nbytes = as_size(value.numel * value.dtype.itemsize)
        reason = _why_copied(planner, position, pack, part, nbytes)
        if reason is None:
            block = planner.blocks[planner.roots[part]]
            block.host = (pack.out.name, offset)
            host.first = min(host.first, block.first)
            placed += 1
        elif nbytes != 0:
            copied.append(f"{part} {reason}")
        offset = as_size(offset + nbytes)
    planner.say(
        pack.out.name,
        f"{placed} of {len(pack.parts)} parts in place, {len(copied)} copied",
        "; ".join(copied) or "every part is dead after the pack",
    )


def _why_copied(planner: _Planner, position: int, pack: Pack, part: str, nbytes: Size) -> str | None:
    """None if ``part`` may lie inside the pack's storage from the start, else the reason why not."""
    root = planner.roots[part]
    block, host = planner.blocks[root], planner.blocks[pack.out.name]
    if block.host is not None:
        return "is packed before"
    if block.home not in (Home.ARENA, Home.FRESH):
        return f"lives in {block.home.value} memory"
    if host.home not in (Home.ARENA, Home.FRESH) or host.device != block.device:
        return f"cannot live in {host.home.value} memory on {host.device}"
    if block.last != position:
        return "is used after the pack" if block.last > position else "is packed before"
    if any(other != part and planner.roots[other] == root for other in pack.parts):
        return "shares its memory with another part"
    if planner.within[part] != 0 or not _equal(block.nbytes, nbytes):
        return "is not the whole of its storage"
    if not _is_row_major(planner, part):
        return "is not row-major"
    return "is empty" if nbytes == 0 else None


def _is_row_major(planner: _Planner, name: str) -> bool:
    alias = planner.strided.get(name)
    value = planner.graph.value(name)
    shape, stride = (value.shape, value.stride) if alias is None else (alias.shape, alias.stride)
    wanted = contiguous_stride(tuple(shape))
    return all(size == 1 or _equal(a, b) for size, a, b in zip(shape, stride, wanted, strict=True))


def _equal(a: Size, b: Size) -> bool:
    return a == b or sympy.expand(a - b) == 0


def _reuse_operands(planner: _Planner, position: int, kernel: Kernel) -> None:
    """Let results of ``kernel`` take the bytes of operands that die in it."""
    taken: set[str] = set()
    settled: set[str] = set()
    for out, operand in kernel.inplace:
        if out in settled:
            continue
        reason = _why_not_reused(planner, position, kernel, out, operand, taken)
        if reason is not None:
            planner.say(out, f"own memory, not that of {operand}", reason)
            continue
        block, host = planner.blocks[out], planner.place(operand)[0]
        taken.add(host.name)
        settled.add(out)
        if host.home is Home.INPUT:
            block.home, block.donor = Home.FRESH, host.name
            planner.say(out, f"takes the memory of {operand} unless somebody holds it", "it was saved for this graph")
            continue
        block.host = (host.name, 0)
        host.last = block.last
        planner.say(out, f"takes the memory of {operand}", f"{operand} dies in this kernel")


def _why_not_reused(
    planner: _Planner, position: int, kernel: Kernel, out: str, operand: str, taken: set[str]
) -> str | None:
    """None if ``out`` may be written over ``operand``, else the reason why not."""
    value, old = planner.graph.value(out), planner.graph.value(operand)
    host, offset = planner.place(operand)
    block = planner.blocks.get(out)
    if block is None or block.host is not None:
        return f"{out} has its place already"
    donated = host.home is Home.INPUT
    if donated and not (_may_be_donated(planner, host) and block.home in (Home.ARENA, Home.FRESH)):
        return f"{operand} belongs to the caller"
    if not donated and (host.home is not block.home or host.home is Home.LIBRARY):
        return f"{operand} is {host.home.value} memory and {out} is {block.home.value} memory"
    if host.name in taken or host.last > position:
        return f"{operand} is still in use"
    if value.dtype.itemsize != old.dtype.itemsize or host.device != block.device:
        return "elements differ in size or device"
    if offset != 0 or not _equal(host.nbytes, block.nbytes):
        return f"{operand}'s storage is not of the same size"
    others = {planner.place(name)[0].name for name in kernel.operands if name != operand}
    return "the kernel reads the same memory through another operand" if host.name in others else None


def _may_be_donated(planner: _Planner, host: _Block) -> bool:
    """Whether an input is probably nobody's but the program's: what a forward graph saves for its backward."""
    large = isinstance(host.nbytes, int) and host.nbytes >= LEAST_DONATED_BYTES
    return large and planner.graph.name.startswith("backward")


def _arenas(planner: _Planner) -> tuple[dict[str, int], dict[str, int]]:
    """Offset of each arena block and size of each device's arena."""
    requests: dict[str, list[Request]] = {}
    for block in planner.blocks.values():
        if block.host is None and block.home in PARTS:
            nbytes = hint(block.nbytes, {})
            request = Request(block.name, nbytes, block.first, block.last)
            requests.setdefault(block.storage().arena, []).append(request)
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for device, wanted in sorted(requests.items()):
        result = assign_offsets(wanted)
        offsets |= result.offsets
        sizes[device] = result.nbytes
        unshared = sum(aligned(request.nbytes) for request in wanted)
        over = 100 * (result.nbytes / result.live_bytes - 1) if result.live_bytes else 0.0
        planner.say(
            f"arena of {device}",
            f"{result.nbytes} bytes for {len(wanted)} storages",
            f"lower bound {result.live_bytes} bytes are alive at once ({over:.1f} % above it); "
            f"{unshared} bytes without sharing",
        )
    return offsets, sizes


def _storage_names(planner: _Planner) -> dict[str, str]:
    """For each leading block the name of the first value in its storage."""
    order = {name: number for number, name in enumerate(planner.graph.defs)}
    names: dict[str, str] = {}
    for root in sorted(planner.blocks, key=order.__getitem__):
        names.setdefault(planner.leader(root)[0].name, root)
    return names


def _frees(planner: _Planner, names: dict[str, str]) -> dict[int, tuple[str, ...]]:
    """FRESH and LIBRARY storages to give back after each position; those of outputs stay."""
    frees: dict[int, list[str]] = {}
    end = len(planner.graph.nodes)
    for block in planner.blocks.values():
        if block.host is None and block.home in (Home.FRESH, Home.LIBRARY) and block.last < end:
            frees.setdefault(block.last, []).append(names[block.name])
    return {position: tuple(frees[position]) for position in sorted(frees)}


def _staging(graph: Graph) -> dict[int, int]:
    """Change of bytes at positions by memory that collectives on CPUs use besides: flat buffers for several tensors at
    once, and a copy of what is reduced and scattered."""
    change: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        if not isinstance(node, Start) or node.pending.in_place or graph.value(node.sources[0]).device != "cpu":
            continue
        flat = carried_bytes(graph, node) if len(node.sources) > 1 else 0
        results = sum(hint(as_size(value.nbytes), graph.size_hints) for value in node.pending.results)
        copied = carried_bytes(graph, node) - results if node.kind is Kind.REDUCE_SCATTER else 0
        end = graph.users[node.pending.name][0] + 1
        change[position] = change.get(position, 0) + flat + copied
        change[end] = change.get(end, 0) - flat - copied
    return change


def _peak_bytes(planner: _Planner, arena_bytes: dict[str, int]) -> int:
    """Arenas, which last as long as the call, and the most bytes of other memory at one position."""
    hints = planner.graph.size_hints
    change = _staging(planner.graph)
    for block in planner.blocks.values():
        if block.host is None and block.home in (Home.FRESH, Home.LIBRARY) and block.donor is None:
            nbytes = hint(block.nbytes, hints)
            change[block.first] = change.get(block.first, 0) + nbytes
            change[block.last + 1] = change.get(block.last + 1, 0) - nbytes
    live = peak = 0
    for position in sorted(change):
        live += change[position]
        peak = max(peak, live)
    return sum(arena_bytes.values()) + peak
