"""From a simulated run to a prediction people can read: what runs when, and why the program waits where it waits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph
from dcompile.plan import Exposure, Interval, Prediction
from dcompile.schedule.simulate import Problem, Run, lower_bound, prepare, simulate

COMPUTE_LANE = "compute"
"""Lane of kernels, library calls, packs, launches and waits; transfers are on the lane named by their group's label."""


def predict(graph: Graph, ctx: Context, before: Graph | None = None) -> Prediction:
    """The order of ``graph`` as the cost model sees it.

    Args:
        before: the same nodes before scheduling, for ``program_order_us``; None if ``graph`` was not reordered.
    """
    problem = prepare(graph, ctx.costs, ctx.prices)
    run = simulate(problem, range(len(graph.nodes)))
    program_us = run.makespan
    if before is not None:
        program_us = simulate(prepare(before, ctx.costs, ctx.prices), range(len(before.nodes))).makespan
    return Prediction(
        makespan_us=run.makespan,
        program_order_us=max(program_us, run.makespan),
        lower_bound_us=min(lower_bound(problem), run.makespan),
        intervals=_intervals(problem, run),
        exposures=_exposures(problem, run, ctx.options.in_flight_bytes),
    )


def _intervals(problem: Problem, run: Run) -> tuple[Interval, ...]:
    """Everything that takes time, by begin; ties in program order."""
    found = [
        Interval(position, COMPUTE_LANE, run.begin[position], run.end[position])
        for position in run.begin
        if run.end[position] > run.begin[position]
    ]
    found += [Interval(p, problem.lane[p], begin, end) for p, (begin, end) in run.transfers.items()]
    return tuple(sorted(found, key=lambda i: (i.start_us, i.position, i.lane)))


def _exposures(problem: Problem, run: Run, cap_bytes: int) -> tuple[Exposure, ...]:
    """One for each collective, in launch order."""
    reasons = _Reasons(problem, run, cap_bytes)
    found = []
    for start, exposed_us in sorted(run.exposed.items()):
        node = problem.graph.nodes[start]
        assert isinstance(node, Start)
        total_us = run.transfers[start][1] - run.begin[start]
        reason = reasons.of(start) if exposed_us > 0 else "hidden under compute"
        found.append(Exposure(node.pending.name, exposed_us, total_us, reason))
    return tuple(found)


class _Reasons:
    """Why the compute lane stands still for collectives. What all of them need is found in one sweep."""

    def __init__(self, problem: Problem, run: Run, cap_bytes: int) -> None:
        self.problem, self.run, self.cap_bytes = problem, run, cap_bytes
        self.spent = (0.0, *accumulate(problem.cost))
        """Compute time before each position."""
        self.in_flight = _in_flight(problem)
        waits = sorted(problem.wait_of[start] for start, us in run.exposed.items() if us > 0)
        self.independent = _independent(problem, waits)

    def of(self, start: int) -> str:
        """Of the collective launched at ``start``."""
        problem, run, wait = self.problem, self.run, self.problem.wait_of[start]
        hidden_us = self.spent[wait] - self.spent[start + 1]
        queued_us = run.transfers[start][0] - run.end[start]
        if queued_us > run.exposed[start] / 2:
            return f"queued {queued_us:.0f} us behind earlier collectives of {problem.lane[start]}"
        other = self.independent.get(wait)
        if other is None:
            readers = [p for p in problem.after[wait] if p > wait]
            if hidden_us <= 0 and readers:
                only = "only " if len(readers) == 1 else "first "
                return f"waited at once by its {only}reader {_name(problem, readers[0])}"
            return f"no independent work after {_name(problem, _last_busy(problem, wait))}"
        busy = self.in_flight[start]
        if busy and busy + problem.carried[start] >= self.cap_bytes:
            return f"in-flight cap: {busy} bytes were in flight at its launch, {self.cap_bytes} are allowed"
        work = f"only {hidden_us:.0f} us of work between launch and wait"
        return f"{work}; {_name(problem, other)} could run there but comes later"


def _name(problem: Problem, position: int) -> str:
    """``kernel k7``, ``extern t3``: the kind of the node and the first thing it defines."""
    node = problem.graph.nodes[position]
    defined = node.defs[0].name if node.defs else f"at {position}"
    return f"{type(node).__name__.lower()} {defined}"


def _last_busy(problem: Problem, wait: int) -> int:
    """The last node before ``wait`` that takes compute time."""
    return next((p for p in reversed(range(wait)) if problem.cost[p] > 0), 0)


def _in_flight(problem: Problem) -> dict[int, int]:
    """Bytes in flight when each Start is launched."""
    found: dict[int, int] = {}
    flying = 0
    for position in range(len(problem.cost)):
        if position in problem.carried:
            found[position] = flying
            flying += problem.carried[position]
        elif position in problem.start_of:
            flying -= problem.carried[problem.start_of[position]]
    return found


def _independent(problem: Problem, waits: Sequence[int]) -> dict[int, int]:
    """For each of ``waits`` (ascending) the first node behind it that takes compute time and does not need it; waits
    without one are left out. Sets of waits are bit masks: the first wait is the lowest bit."""
    found: dict[int, int] = {}
    number = {wait: n for n, wait in enumerate(waits)}
    masks = [0] * len(problem.cost)
    passed = 0  # waits so far that have no such node yet
    for position, before in enumerate(problem.before):
        mask = 0
        for other in before:
            mask |= masks[other]
        free = passed & ~mask if problem.cost[position] > 0 else 0
        passed &= ~free
        while free:
            low = free & -free
            found[waits[low.bit_length() - 1]] = position
            free ^= low
        if position in number:
            mask |= 1 << number[position]
            passed |= 1 << number[position]
        masks[position] = mask
    return found
