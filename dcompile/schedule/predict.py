"""From a simulated run to a prediction people can read: what runs when, and why the program waits where it waits."""

from __future__ import annotations

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
    independent = _Independent(problem)
    found = []
    for start, exposed_us in sorted(run.exposed.items()):
        node = problem.graph.nodes[start]
        assert isinstance(node, Start)
        total_us = run.transfers[start][1] - run.begin[start]
        reason = _reason(problem, run, start, cap_bytes, independent) if exposed_us > 0 else "hidden under compute"
        found.append(Exposure(node.pending.name, exposed_us, total_us, reason))
    return tuple(found)


def _reason(problem: Problem, run: Run, start: int, cap_bytes: int, independent: _Independent) -> str:
    """Why the compute lane stood still for the collective launched at ``start``."""
    wait = problem.wait_of[start]
    hidden_us = sum(problem.cost[start + 1 : wait])
    queued_us = run.transfers[start][0] - run.end[start]
    if queued_us > run.exposed[start] / 2:
        return f"queued {queued_us:.0f} us behind earlier collectives of {problem.lane[start]}"
    other = independent.after(wait)
    if other is None:
        readers = [p for p in problem.after[wait] if p > wait]
        if hidden_us == 0 and readers:
            only = "only " if len(readers) == 1 else "first "
            return f"waited at once by its {only}reader {_name(problem, readers[0])}"
        return f"no independent work after {_name(problem, _last_busy(problem, wait))}"
    busy = _in_flight(problem, start)
    if busy and busy + problem.carried[start] >= cap_bytes:
        return f"in-flight cap: {busy} bytes were in flight at its launch, {cap_bytes} are allowed"
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


def _in_flight(problem: Problem, start: int) -> int:
    """Bytes in flight when the node at ``start`` is launched."""
    return sum(problem.carried[s] for s in problem.carried if s < start < problem.wait_of[s])


class _Independent:
    """Finds compute that does not need a given node. Sets of positions are bit masks: node 0 is the lowest bit."""

    def __init__(self, problem: Problem) -> None:
        self._busy = sum(1 << p for p, cost in enumerate(problem.cost) if cost > 0)
        self._problem = problem
        self._needs: list[int] | None = None

    def after(self, position: int) -> int | None:
        """The first node behind ``position`` that takes compute time and does not depend on it."""
        if self._needs is None:
            self._needs = self._dependents()
        rest = self._busy & ~self._needs[position] & (-1 << (position + 1))
        return (rest & -rest).bit_length() - 1 if rest else None

    def _dependents(self) -> list[int]:
        masks = [0] * len(self._problem.cost)
        for position in reversed(range(len(masks))):
            mask = 0
            for after in self._problem.after[position]:
                mask |= masks[after] | (1 << after)
            masks[position] = mask
        return masks
