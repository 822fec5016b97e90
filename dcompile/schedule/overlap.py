"""Communication under compute: list scheduling over the dependence graph, checked against program order.

Launches happen as soon as their operands are ready and the in-flight cap has room, waits as late as their first
reader allows, and the compute lane prefers what the next launches need. Launches of one group keep their order, so for
one group "first everything the first launch needs, then everything the second needs, ..." lets each launch happen at
the earliest possible time (Jackson's rule for one machine with delivery times); with several groups the launch with
the longest path behind it comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph, given_bytes
from dcompile.schedule.list_schedule import Priority, list_schedule
from dcompile.schedule.live import footing, peak_bytes, room_bytes
from dcompile.schedule.order import reorder
from dcompile.schedule.predict import predict
from dcompile.schedule.simulate import Problem, Tails, lower_bound, prepare, simulate, tails

STAGE = "overlap"

PEAK_FACTOR = 1.10
"""A schedule may use this many times the peak memory of program order, plus what is in flight (bounded by
``Options.in_flight_bytes``). A choice, not a measurement: room for reordering, little enough that a program which fits
with a tenth to spare still fits."""

GAIN = 1e-3
"""Schedules whose predicted makespans differ by less than this share are equal: the cost model is not that exact. Of
equal ones the one that stands still less is taken, because a wait also waits for the slowest rank, which the model does
not know; then the one with the smaller peak."""

CLOSE = 1.005
"""No further policy is tried when a schedule is within this factor of the lower bound."""


@dataclass(frozen=True)
class Candidate:
    """One order with its predicted makespan, the part of it spent standing still in waits, and its peak memory."""

    policy: str
    order: tuple[int, ...]
    makespan_us: float
    exposed_us: float
    peak_bytes: int


Policy = Callable[[Tails], Priority]

POLICIES: dict[str, tuple[Policy, bool]] = {
    "what the next launch needs": (lambda found: [(-u, p) for p, u in enumerate(found.urgency)], False),
    "program order with early launches and late waits": (
        lambda found: [(0.0, p) for p in range(len(found.path))],
        False,
    ),
    "what the next launch needs, patiently": (lambda found: [(-u, p) for p, u in enumerate(found.urgency)], True),
    "longest path": (lambda found: [(-length, p) for p, length in enumerate(found.path)], False),
    "longest path, patiently": (lambda found: [(-length, p) for p, length in enumerate(found.path)], True),
}
"""Priority of each node for the compute lane, smallest first, and whether the schedule is patient (``list_schedule``),
by the name the verdict shows; in the order in which they are tried."""


def overlap(graph: Graph, ctx: Context) -> Graph:
    """Reorder ``graph`` so that collectives run under compute; program order stays where that is not predicted faster.

    Leaves a verdict with the times, the lower bound and the reason.
    """
    if not any(isinstance(node, Start) for node in graph.nodes):
        ctx.verdict(STAGE, graph.name, "program order", "no collectives")
        return graph
    problem = prepare(graph, ctx.costs, ctx.prices)
    program = program_order(problem)
    bound_us = lower_bound(problem)
    room = room_bytes(graph, ctx.options.peak_memory_bytes)
    best = best_schedule(problem, program, bound_us, ctx.options.in_flight_bytes, room)
    _report_memory(graph, best, room, ctx)
    times = f"predicted {best.makespan_us:.0f} us, program order {program.makespan_us:.0f} us"
    times += f", lower bound {bound_us:.0f} us"
    if best is program:
        ctx.verdict(
            STAGE, graph.name, "program order", f"no legal schedule within the memory budget is faster; {times}"
        )
        return graph
    memory = f"peak {best.peak_bytes} bytes, in program order {program.peak_bytes}"
    ctx.verdict(STAGE, graph.name, f"reordered: {best.policy}", f"{times}; {memory}")
    return reorder(graph, best.order)


def _report_memory(graph: Graph, best: Candidate, room: int | None, ctx: Context) -> None:
    if room is None:
        return
    subject = f"{graph.name}: peak_memory_bytes={ctx.options.peak_memory_bytes}"
    reason = f"{best.peak_bytes} bytes beside {given_bytes(graph)} that it is given"
    ctx.verdict(STAGE, subject, "kept" if best.peak_bytes <= room else "not kept: program order needs more", reason)


def program_order(problem: Problem) -> Candidate:
    """The order as it stands."""
    order = tuple(range(len(problem.cost)))
    return _candidate(problem, "program order", order, peak_bytes(footing(problem.graph), order))


def _candidate(problem: Problem, policy: str, order: tuple[int, ...], peak: int) -> Candidate:
    run = simulate(problem, order)
    return Candidate(policy, order, run.makespan, sum(run.exposed.values()), peak)


def best_schedule(
    problem: Problem, program: Candidate, bound_us: float, cap_bytes: int, room: int | None = None
) -> Candidate:
    """The best of all policies; ``program`` itself if nothing within the memory budget is predicted faster.

    Args:
        room: no schedule may use more, whatever the budget; None for no bound.
    """
    found = tails(problem)
    ground = footing(problem.graph)
    budget = int(PEAK_FACTOR * program.peak_bytes)
    if room is not None:
        budget, cap_bytes = min(budget, room), max(min(cap_bytes, room - program.peak_bytes), 0)
    most = min(budget + cap_bytes, room if room is not None else budget + cap_bytes)
    best = program
    for policy, (priority, patient) in POLICIES.items():
        order = list_schedule(problem, priority(found), ground, cap_bytes, budget, patient)
        candidate = _candidate(problem, policy, order, peak_bytes(ground, order))
        if candidate.peak_bytes <= most and _better(candidate, best):
            best = candidate
        if best.makespan_us <= CLOSE * bound_us:
            break
    return best


def _better(new: Candidate, old: Candidate) -> bool:
    """Faster; or equally fast (within ``GAIN``, not slower) and standing still less; or as much with a smaller peak."""
    if abs(new.makespan_us - old.makespan_us) > GAIN * old.makespan_us:
        return new.makespan_us < old.makespan_us
    if new.makespan_us > old.makespan_us:
        return False
    if abs(new.exposed_us - old.exposed_us) > GAIN * old.makespan_us:
        return new.exposed_us < old.exposed_us
    return new.makespan_us < old.makespan_us and new.peak_bytes < old.peak_bytes


__all__ = ["best_schedule", "overlap", "predict", "program_order"]
