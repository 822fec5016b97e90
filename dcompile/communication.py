"""What becomes of each collective of a program: predicted and measured times, what hides it, and traces of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcompile.collectives.nodes import Start, Via, Wait
from dcompile.collectives.rules import payload_bytes
from dcompile.ir.nodes import Node
from dcompile.plan import Interval, Plan
from dcompile.runtime.timeline import Span, Timeline

COMPUTE = "compute"
SHOWN_HIDERS = 2


@dataclass(frozen=True)
class CollectiveRow:
    """One collective.

    Attributes:
        name: of its pending.
        kind: ``"all_reduce.sum"``, and its lowering unless that is the backend's own: ``"all_gather via peers"``.
        group: label and number of ranks, ``"g0[8]"``.
        nbytes: payload of one rank.
        predicted_us: of the transfer.
        exposed_us: predicted time the program stands still for it.
        measured_us: from launch to completion in the recorded call; None if there is none.
        waited_us: measured time the program stood still in its wait.
        hidden_by: the steps predicted to run beside it, the longest first, with microseconds.
        reason: why no more of it is hidden.
        source: the user's line.
    """

    name: str
    kind: str
    group: str
    nbytes: int
    predicted_us: float
    exposed_us: float
    measured_us: float | None
    waited_us: float | None
    hidden_by: tuple[tuple[str, float], ...]
    reason: str
    source: str


def collective_rows(plan: Plan, recorded: Timeline | None = None) -> tuple[CollectiveRow, ...]:
    """One row for each collective of ``plan`` in launch order; ``recorded``: one of its calls."""
    if plan.prediction is None:
        return ()
    nodes, spans = plan.graph.nodes, recorded.spans if recorded is not None else []
    exposures = {exposure.pending: exposure for exposure in plan.prediction.exposures}
    compute = [interval for interval in plan.prediction.intervals if interval.lane == COMPUTE]
    rows = []
    for interval in sorted(plan.prediction.intervals, key=lambda found: found.position):
        node = nodes[interval.position]
        if not isinstance(node, Start) or interval.lane == COMPUTE:
            continue
        exposure = exposures[node.pending.name]
        rows.append(
            CollectiveRow(
                name=node.pending.name,
                kind=node.kind.value + (f".{node.reduction}" if node.reduction else "") + _via(node),
                group=f"{node.group.label}[{node.group.size}]",
                nbytes=payload_bytes(node, plan.graph),
                predicted_us=interval.end_us - interval.start_us,
                exposed_us=exposure.exposed_us,
                measured_us=_duration(spans, f"{node.pending.name} = ", node.group.label),
                waited_us=_duration(spans, f"{node.pending.results[0].name}", "wait"),
                hidden_by=_hiders(interval, compute, nodes),
                reason=exposure.reason,
                source=node.origin.source,
            )
        )
    return tuple(rows)


def _via(start: Start) -> str:
    return "" if start.via is Via.LIBRARY else f" via {start.via.value}"


def _duration(spans: Iterable[Span], name: str, lane: str) -> float | None:
    found = [
        s.duration_us for s in spans if s.lane == lane and (s.name == name or s.name.startswith(name.strip() + " "))
    ]
    return found[0] if found else None


def _hiders(transfer: Interval, compute: Iterable[Interval], nodes: Sequence[Node]) -> tuple[tuple[str, float], ...]:
    """Steps of the compute lane that take time while ``transfer`` runs."""
    beside = [
        (step_name(nodes[step.position]), min(step.end_us, transfer.end_us) - max(step.start_us, transfer.start_us))
        for step in compute
        if not isinstance(nodes[step.position], Start | Wait)
    ]
    return tuple(sorted((pair for pair in beside if pair[1] > 0), key=lambda pair: -pair[1]))


def step_name(node: Node) -> str:
    """``"kernel t2"``: the kind of a step and the first thing it defines."""
    defined = f" {node.defs[0].name}" if node.defs else ""
    return f"{type(node).__name__.lower()}{defined}"


def table(rows: Sequence[CollectiveRow]) -> str:
    """The rows as text, one line each under a heading; "" without rows."""
    if not rows:
        return ""
    lines = ["collectives: name, kind @group, bytes, predicted us (exposed), measured us (waited), hidden by"]
    for row in rows:
        measured = f"{row.measured_us:.0f} ({row.waited_us or 0.0:.0f})" if row.measured_us is not None else "-"
        hidden = ", ".join(f"{name} {us:.0f} us" for name, us in row.hidden_by[:SHOWN_HIDERS]) or "nothing"
        more = f" and {len(row.hidden_by) - SHOWN_HIDERS} more" if len(row.hidden_by) > SHOWN_HIDERS else ""
        lines.append(
            f"  {row.name}  {row.kind} @{row.group}  {row.nbytes}  {row.predicted_us:.0f} ({row.exposed_us:.0f})  "
            f"{measured}  {hidden}{more}; {row.reason}  {row.source}".rstrip()
        )
    return "\n".join(lines)


PREDICTED, MEASURED = 1, 0
"""Process numbers of the two halves of a trace."""


def trace_events(programs: Sequence[tuple[Plan | None, Timeline]]) -> list[dict[str, object]]:
    """Chrome trace events (Perfetto reads them) of one step: measured lanes, and below them the predicted ones.

    The prediction of a program begins where its measured call begins. Time that is exposed is an event of its own in
    the lane ``exposed``, with the reason as argument.

    Args:
        programs: the calls of the step in order, each with its plan if that is known.
    """
    lanes: dict[tuple[int, str], int] = {}
    events: list[dict[str, object]] = []

    def add(
        half: int, lane: str, name: str, program: str, start: float, end: float, args: Mapping[str, object]
    ) -> None:
        number = lanes.setdefault((half, lane), len(lanes))
        event = {"ph": "X", "name": name, "cat": program, "pid": half, "tid": number}
        events.append(event | {"ts": start, "dur": end - start, "args": dict(args)})

    origin_s = min((timeline.start_s for _, timeline in programs), default=0.0)
    for plan, timeline in programs:
        begin = (timeline.start_s - origin_s) * 1e6
        rows = {} if plan is None else {row.name: row for row in collective_rows(plan, timeline)}
        reasons = {} if plan is None else _reasons(plan, rows)
        for span in timeline.spans:
            lane = "exposed" if span.lane == "wait" else span.lane
            args = {"reason": reasons[span.name.split(" ")[0]]} if span.name.split(" ")[0] in reasons else {}
            add(MEASURED, lane, span.name, timeline.program, begin + span.start_us, begin + span.end_us, args)
        if plan is not None and plan.prediction is not None:
            for interval in plan.prediction.intervals:
                node = plan.graph.nodes[interval.position]
                exposed = isinstance(node, Wait) and node.pending in rows
                lane = "exposed" if exposed else interval.lane
                args = {"reason": rows[node.pending].reason} if isinstance(node, Wait) and exposed else {}
                start, end = begin + interval.start_us, begin + interval.end_us
                add(PREDICTED, lane, step_name(node), timeline.program, start, end, args)
    return [*_names(lanes), *events]


def _reasons(plan: Plan, rows: Mapping[str, CollectiveRow]) -> dict[str, str]:
    """Why the program waits, by the name of the first result of the wait."""
    waits = (node for node in plan.graph.nodes if isinstance(node, Wait))
    return {wait.outs[0].name: rows[wait.pending].reason for wait in waits if wait.pending in rows}


def _names(lanes: Mapping[tuple[int, str], int]) -> list[dict[str, object]]:
    halves = {MEASURED: "measured", PREDICTED: "predicted"}
    named: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": half, "args": {"name": name}} for half, name in halves.items()
    ]
    for (half, lane), number in lanes.items():
        named.append({"ph": "M", "name": "thread_name", "pid": half, "tid": number, "args": {"name": lane}})
    return named
