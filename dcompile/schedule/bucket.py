"""Bucketing: independent collectives of one kind travel together, as many as the cost model finds best.

All-reduces of one group, reduction, dtype and device are packed into one flat buffer and reduced in place; gathers and
scatters become one coalesced launch. Few large collectives save latency, many small ones start earlier and leave less
exposed at the end: a handful of sizes is scheduled and simulated, and the fastest one is taken. A bucket is in flight
as a whole, so none holds more than half of ``Options.in_flight_bytes`` from launch to wait, unless the user chose its
size: while one is read, the next one is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import nsmallest
from itertools import accumulate

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Kind, Start
from dcompile.collectives.rules import is_contiguous, payload_bytes
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import View
from dcompile.schedule.links import carried_bytes
from dcompile.schedule.list_schedule import list_schedule
from dcompile.schedule.live import footing, peak_bytes, room_bytes
from dcompile.schedule.merge import Bucket, Member, depended_on, merge, true_predecessors
from dcompile.schedule.overlap import CLOSE, GAIN, PEAK_FACTOR, POLICIES, best_schedule, program_order
from dcompile.schedule.prefetch import prefetch, wait_in_time
from dcompile.schedule.refine import Buckets, refine, tries_for
from dcompile.schedule.simulate import Problem, lower_bound, prepare, simulate, tails

STAGE = "bucket"

MERGEABLE = frozenset({Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.ALL_TO_ALL})
"""Kinds of which training steps have many small ones."""

SMALLEST_BUCKET = 2**20
"""Bytes of the first size tried. Below 1 MiB latency is all: NCCL on NVLink takes 38 us for 4 KiB and 35 us for 1 MiB,
gloo over loopback 325 us and 520 us."""


IN_FLIGHT = 2
"""Buckets of the largest size that may be in flight at once."""


def bucket_collectives(graph: Graph, ctx: Context) -> Graph:
    """Merge collectives into buckets of ``Options.bucket_bytes``, or of the size predicted fastest.

    Leaves a verdict for every size tried and for every collective that cannot be merged.
    """
    if not any(isinstance(node, Start) for node in graph.nodes):
        return graph
    graph = _ahead(graph, ctx)
    before = true_predecessors(graph)
    members = _members(graph, before, ctx)
    if len(members) < 2:
        return graph
    if ctx.options.bucket_bytes is not None:
        merged, refused = merge(graph, before, _fill(members, ctx.options.bucket_bytes))
        _report_refused(graph, refused, ctx)
        ctx.verdict(STAGE, graph.name, f"buckets of {ctx.options.bucket_bytes} bytes", "set by bucket_bytes")
        return _ahead(merged, ctx)
    return _cheapest(graph, before, members, ctx)


def _ahead(graph: Graph, ctx: Context) -> Graph:
    """``graph`` with its gathers where they are due, if there is room for them."""
    room = room_bytes(graph, ctx.options.peak_memory_bytes)
    moved = prefetch(graph, ctx.costs, ctx.prices, ctx.options.in_flight_bytes)
    moved = wait_in_time(moved, ctx.options.in_flight_bytes)
    order = range(len(graph.nodes))
    return graph if room is not None and peak_bytes(footing(moved), order) > room else moved


def _cheapest(graph: Graph, before: Sequence[tuple[int, ...]], members: list[Member], ctx: Context) -> Graph:
    def makespan_us(buckets: Sequence[Bucket]) -> float:
        return scheduled_us(_merged(graph, before, buckets, ctx)[0], ctx)

    starts: list[tuple[float, Buckets]] = [(scheduled_us(graph, ctx), tuple((member,) for member in members))]
    names = ["no bucketing"]
    best = 0
    for limit, buckets in _promising(graph, members, ctx):
        starts.append((makespan_us(buckets), tuple(buckets)))
        names.append(f"buckets of {limit} bytes")
        if starts[-1][0] < (1 - GAIN) * starts[best][0]:
            best = len(starts) - 1
    best_us, chosen = starts[best]
    if best_us > CLOSE * sum(prepare(graph, ctx.costs, ctx.prices).cost):  # else nothing to speak of is exposed
        tries, held = tries_for(len(graph.nodes)), ctx.options.in_flight_bytes // IN_FLIGHT
        best_us, chosen = refine([starts[best], *starts], makespan_us, tries, GAIN, held)
    if chosen != starts[best][1]:
        best = len(starts)
        starts.append((best_us, chosen))
        names.append(f"{len(chosen)} buckets of several sizes")
    merged, refused = _merged(graph, before, chosen, ctx)
    _report_refused(graph, refused, ctx)
    for n, (name, (us, _)) in enumerate(zip(names, starts, strict=True)):
        decision = "taken" if n == best else "not taken"
        reason = f"predicted {us:.0f} us, best {best_us:.0f} us"
        if us == math.inf:
            reason = f"more than peak_memory_bytes={ctx.options.peak_memory_bytes}"
        ctx.verdict(STAGE, f"{graph.name}: {name}", decision, reason)
    return merged


def _merged(
    graph: Graph, before: Sequence[tuple[int, ...]], buckets: Sequence[Bucket], ctx: Context
) -> tuple[Graph, list[Bucket]]:
    """``graph`` with these buckets, launches where they are due; and the buckets that could not be merged."""
    merged, refused = merge(graph, before, buckets)
    return (graph if merged is graph else _ahead(merged, ctx)), refused


FULL_SEARCH_NODES, PROMISING = 1500, 1
"""In larger graphs only the sizes with the shortest estimates are scheduled, so many. A schedule of ten thousand
nodes takes a quarter of a second, an estimate a hundredth of that."""


def _promising(graph: Graph, members: list[Member], ctx: Context) -> list[tuple[int, list[Bucket]]]:
    """Limits with their buckets, each set of buckets once, in ascending order of the limit."""
    found: dict[tuple[Bucket, ...], int] = {}
    for limit in _sizes(members):
        buckets = tuple(_fill(members, limit, ctx.options.in_flight_bytes // IN_FLIGHT))
        if any(len(bucket) > 1 for bucket in buckets):
            found.setdefault(buckets, limit)
    chosen = list(found)
    if len(graph.nodes) > FULL_SEARCH_NODES:
        problem = prepare(graph, ctx.costs, ctx.prices)
        done = list(accumulate(problem.cost))
        chosen = nsmallest(
            PROMISING, chosen, key=lambda buckets: (_estimate_us(problem, done, buckets, ctx), found[buckets])
        )
    return sorted(((found[buckets], list(buckets)) for buckets in chosen), key=lambda pair: pair[0])


def _estimate_us(problem: Problem, done: Sequence[float], buckets: Sequence[Bucket], ctx: Context) -> float:
    """When the last bucket has travelled if compute ran in program order without a halt, slowed by what runs beside it.

    Args:
        done: when each node has run, by position.
    """
    free: dict[str, float] = {}
    added = 0.0
    for bucket in sorted(buckets, key=lambda bucket: max(member.available for member in bucket)):
        node = problem.graph.nodes[bucket[0].start]
        assert isinstance(node, Start), "buckets hold launches"
        lane, payload = problem.lane[bucket[0].start], sum(member.nbytes for member in bucket)
        transfer_us = ctx.costs.link(lane).by(node.via).transfer_us(node.kind, payload, node.group.size)
        added += transfer_us * problem.contention[bucket[0].start]
        ready = max(member.available for member in bucket)
        free[lane] = max(free.get(lane, 0.0), done[ready] if ready >= 0 else 0.0) + transfer_us
    return max(max(free.values()), done[-1] + added)


def _sizes(members: Sequence[Member]) -> Iterator[int]:
    """Powers of two from ``SMALLEST_BUCKET``; the last one holds everything."""
    total = sum(member.nbytes for member in members)
    size = SMALLEST_BUCKET
    while size < total:
        yield size
        size *= 2
    yield size


EVERY_POLICY_NODES = 200
"""In larger graphs a set of buckets is judged by the first policy of the overlap pass alone."""


def scheduled_us(graph: Graph, ctx: Context) -> float:
    """Predicted time of ``graph`` after the overlap pass; infinite if it needs too much memory."""
    problem = prepare(graph, ctx.costs, ctx.prices)
    room = room_bytes(graph, ctx.options.peak_memory_bytes)
    if len(graph.nodes) <= EVERY_POLICY_NODES:
        program, bound_us = program_order(problem), lower_bound(problem)
        chosen = best_schedule(problem, program, bound_us, ctx.options.in_flight_bytes, room)
        return chosen.makespan_us if room is None or chosen.peak_bytes <= room else math.inf
    ground = footing(graph)
    order = range(len(graph.nodes))
    budget = int(PEAK_FACTOR * peak_bytes(ground, order))
    priority, patient = next(iter(POLICIES.values()))
    best = list_schedule(problem, priority(tails(problem)), ground, ctx.options.in_flight_bytes, budget, patient)
    fitting = [found for found in (best, order) if room is None or peak_bytes(ground, found) <= room]
    return min((simulate(problem, found).makespan for found in fitting), default=math.inf)


def _fill(members: Sequence[Member], limit_bytes: int, held_bytes: int | None = None) -> list[Bucket]:
    """Fill buckets in the order in which sources become available, one open bucket for each key.

    A bucket closes when the next member would exceed the limit, or would make it hold more than ``held_bytes`` from
    launch to wait, or depends on a result of the bucket.
    """
    opened: dict[tuple[object, ...], _Open] = {}
    closed: list[list[int]] = []
    for number in sorted(range(len(members)), key=lambda n: (members[n].available, members[n].start)):
        member = members[number]
        current = opened.get(member.key)
        if current is None:
            current = opened[member.key] = _Open()
        elif current.refuses(number, member, limit_bytes, held_bytes):
            closed.append(current.numbers)
            current = opened[member.key] = _Open()
        current.add(number, member)
    closed += (bucket.numbers for bucket in opened.values())
    return sorted((tuple(members[n] for n in bucket) for bucket in closed), key=lambda b: b[0].start)


class _Open:
    """A bucket that is being filled; ``needs`` is what its members' launches depend on, as a bit mask of members."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.nbytes = self.held = self.needs = self.mask = 0

    def refuses(self, number: int, member: Member, limit_bytes: int, held_bytes: int | None) -> bool:
        full = self.nbytes + member.nbytes > limit_bytes
        full |= held_bytes is not None and self.held + member.held > held_bytes
        return full or bool(member.needs & self.mask) or bool(self.needs >> number & 1)

    def add(self, number: int, member: Member) -> None:
        self.numbers.append(number)
        self.nbytes += member.nbytes
        self.held += member.held
        self.needs |= member.needs
        self.mask |= 1 << number


def _members(graph: Graph, before: Sequence[tuple[int, ...]], ctx: Context) -> list[Member]:
    """Collectives that may be merged, in launch order."""
    roots = storage_roots(graph)
    names_in: dict[str, list[str]] = {}
    for name, root in roots.items():
        names_in.setdefault(root, []).append(name)
    sharing = {name: names_in[root] for name, root in roots.items()}
    spoilt = _spoilt_results(graph)
    found: list[Member] = []
    for position, node in enumerate(graph.nodes):
        if not isinstance(node, Start) or node.kind not in MERGEABLE:
            continue
        wait = graph.users[node.pending.name][0]
        reason = spoilt.get(node.pending.name) or _why_alone(graph, position, node, wait, sharing)
        if reason is not None:
            ctx.verdict(STAGE, node.pending.name, "not merged", reason)
            continue
        value = graph.value(node.sources[0])
        key = (node.kind, node.group, node.reduction, value.dtype, value.device, node.via)
        available = max(before[position], default=-1)
        payload = payload_bytes(node, graph)
        held = payload if node.kind is Kind.ALL_REDUCE else carried_bytes(graph, node)  # reduced in place when packed
        found.append(Member(position, wait, key, available, payload, held))
    reached = depended_on(before, {member.wait: 1 << n for n, member in enumerate(found)})
    return [replace(member, needs=reached[member.start], number=n) for n, member in enumerate(found)]


def _spoilt_results(graph: Graph) -> dict[str, str]:
    """Collectives whose results, or views of them, are written later: by pending, the reason."""
    starts = [node for node in graph.nodes if isinstance(node, Start)]
    pending_of = {result.name: start.pending.name for start in starts for result in start.pending.results}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node, View) and node.base in pending_of:
            pending_of[node.out.name] = pending_of[node.base]
        for name in node.mutates:
            if name in pending_of:
                found.setdefault(pending_of[name], f"its result {name} is written later")
    return found


def _why_alone(graph: Graph, position: int, start: Start, wait: int, sharing: Mapping[str, list[str]]) -> str | None:
    """None if ``start`` may be merged, else the reason. ``sharing``: by name, all names of the same storage."""
    values = [graph.value(name) for name in start.sources]
    if start.in_splits:
        return "its shares are unequal"
    if any((v.dtype, v.device) != (values[0].dtype, values[0].device) for v in values):
        return "its sources differ in dtype or device"
    if not all(is_contiguous(result) for result in start.pending.results):
        return "its results are not contiguous"
    if not start.pending.in_place:
        return None
    if start.kind is not Kind.ALL_REDUCE:
        return "it works in place"
    return _why_memory_matters(graph, position, start, wait, sharing)


def _why_memory_matters(
    graph: Graph, position: int, start: Start, wait: int, sharing: Mapping[str, list[str]]
) -> str | None:
    """None if nobody but the readers of the results sees that ``start`` overwrites its sources."""
    results = {out.name for out in graph.nodes[wait].defs}
    for source in start.sources:
        for name in sharing[source]:
            made = graph.nodes[graph.producer[name]] if name in graph.producer else None
            if made is None:
                return f"it overwrites the input {name} in place"
            if isinstance(made, View) and made.base in results:
                results.add(name)
            if name in results:
                continue
            if name in graph.output_names:
                return f"{name}, which shares its memory, is returned"
            if any(user > position and user != wait for user in graph.users[name]):
                return f"{name}, which shares its memory, is used later"
    return None


def _report_refused(graph: Graph, refused: Sequence[Bucket], ctx: Context) -> None:
    for bucket in refused:
        names = [d.name for member in bucket for d in graph.nodes[member.start].defs]
        reason = "together they would wait for their own results"
        ctx.verdict(STAGE, ", ".join(names), "not merged", reason)
