"""``dcompile.explain``: what became of a function, graph by graph; and how much communication the last steps hid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcompile.backend import backend
from dcompile.capture import every_recompile, graph_breaks, tensors_in
from dcompile.communication import CollectiveRow, collective_rows, table, trace_events
from dcompile.ir.graph import given_bytes
from dcompile.ir.nodes import Extern
from dcompile.options import Options, process_rank
from dcompile.pipeline import Built
from dcompile.plan import Plan
from dcompile.runtime.timeline import RECORDER, Timeline, last_timelines
from dcompile.watch import describe_memory, describe_schedule, describe_verdicts


@dataclass(frozen=True)
class GraphExplanation:
    """One compiled graph.

    Attributes:
        built: both generated programs, the plan and the compile time by stage.
        recorded: its last call, step by step; None if it was not called.
    """

    built: Built
    recorded: Timeline | None = None

    @property
    def collectives(self) -> tuple[CollectiveRow, ...]:
        """Each collective: bytes, group, predicted and measured microseconds, what hides it."""
        return collective_rows(self.plan, self.recorded) if self.plan else ()

    @property
    def name(self) -> str:
        """``"forward0"``, ``"backward0"``, ``"inference1"``, …"""
        return self.built.name

    @property
    def plan(self) -> Plan | None:
        """The verified program: schedule, places, predicted times, decisions. None if it runs op by op."""
        return self.built.plan

    @property
    def library_calls(self) -> Counter[str]:
        """All library calls, by op."""
        return Counter(n.op for n in self._externs)

    @property
    def fallbacks(self) -> Counter[str]:
        """Library calls made for want of a lowering rule, by op; the whole graph if it runs op by op."""
        if self.built.op_by_op:
            return Counter({f"{self.name} op by op": 1})
        return Counter(n.op for n in self._externs if n.fallback)

    def calls_json(self) -> str:
        """All library calls as JSON, for another executor (``codegen.calls``, ``runtime.replay``).

        Raises:
            Unsupported: a call that returns something else than tensors.
        """
        return self.built.calls_json()

    @property
    def decisions(self) -> str:
        """Every decision with its reason, a line each."""
        return describe_verdicts(self.plan.verdicts) if self.plan else ""

    @property
    def given_bytes(self) -> int:
        """Bytes of the tensors the program is called with; 0 if it runs op by op."""
        return given_bytes(self.plan.graph) if self.plan else 0

    @property
    def peak_bytes(self) -> int:
        """Predicted: most bytes in use while the program runs, what it is called with included."""
        return self.given_bytes + (self.plan.peak_bytes if self.plan else 0)

    @property
    def _externs(self) -> list[Extern]:
        return [n for n in self.plan.graph.nodes if isinstance(n, Extern)] if self.plan else []

    def __str__(self) -> str:
        plan, kernels = self.plan, self.built.kernels
        if plan is None or kernels is None:
            return f"== {self.name}: op by op through the library, because {self.built.op_by_op}"
        distinct = len({call.function for call in kernels.calls.values()})
        stages = ", ".join(f"{stage} {seconds * 1e3:.0f} ms" for stage, seconds in self.built.seconds.items())
        parts = [
            f"== {self.name}: {len(kernels.calls)} kernel launches of {distinct} kernels, "
            f"{sum(self.library_calls.values())} library calls",
            f"stages: {stages}",
            describe_schedule(plan),
            *filter(None, [table(self.collectives)]),
            f"{describe_memory(plan).splitlines()[0]}; {self.given_bytes:,} bytes are given",
            "library calls: " + _counted(self.library_calls),
            "fallbacks: " + _counted(self.fallbacks),
            "kernels:",
        ]
        for position, call in sorted(kernels.calls.items()):
            origin = plan.graph.nodes[position].origin
            parts.append(f"  {position:4d} {call.function}  {', '.join(origin.ops)[:120]}  {origin.source}")
            parts += [f"         {line}" for line in origin.stack.splitlines()]
        return "\n".join(parts)


@dataclass(frozen=True)
class Explanation:
    """All graphs of one function.

    Attributes:
        graphs: in the order in which they were compiled.
        graph_breaks: times capture had to leave the function.
        result: what the function returned.
    """

    graphs: tuple[GraphExplanation, ...]
    graph_breaks: int
    result: Any

    @property
    def peak_bytes(self) -> int:
        """Predicted: most bytes in use during a step. Working memory of all programs stays from call to call."""
        arenas = [sum(graph.plan.arena_bytes.values()) if graph.plan else 0 for graph in self.graphs]
        return max((g.peak_bytes + sum(arenas) - own for g, own in zip(self.graphs, arenas, strict=True)), default=0)

    @property
    def fallbacks(self) -> Counter[str]:
        return sum((graph.fallbacks for graph in self.graphs), Counter())

    def __str__(self) -> str:
        head = f"{len(self.graphs)} graphs, {self.graph_breaks} graph breaks, fallbacks: {_counted(self.fallbacks)}"
        head += f"; predicted peak {self.peak_bytes:,} bytes"
        return "\n\n".join([head, *map(str, self.graphs)])


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(names.items())) or "none"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``function`` for these arguments, run it once, and tell what was made of it.

    The function runs for real, its side effects included, with the options of the environment. The disk cache is left
    out, so that every stage is seen. If a result requires a gradient, gradients are computed once and thrown away, so
    that the backward graph is seen too; ``.grad`` is not touched.
    """
    seen: list[Built] = []
    options = replace(Options.from_env(), cache_dir=None, timeline=True)
    before = graph_breaks()
    with every_recompile():
        result = torch.compile(function, backend=backend(options, seen.append))(*args, **kwargs)
        _run_backward(result)
    calls = {timeline.program: timeline for timeline in last_timelines()}
    graphs = tuple(GraphExplanation(built, calls.get(built.name)) for built in seen)
    return Explanation(graphs, graph_breaks() - before, result)


def trace(path: str | Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compile ``function`` for these arguments, run it, and write a trace of its second run to ``path``.

    The trace is Chrome trace JSON, which Perfetto shows: what ran when, measured and predicted, one lane for compute
    and one for each group, and the exposed communication with its reasons. Each rank writes its own file; ``{rank}``
    in ``path`` stands for its number. Like ``explain`` this really runs the function, with gradients if it has some.

    Returns:
        What the second run returned.
    """
    seen: list[Built] = []
    options = replace(Options.from_env(), cache_dir=None, timeline=True)
    compiled = torch.compile(function, backend=backend(options, seen.append))
    with every_recompile():
        for _ in range(2):
            before = RECORDER.begun
            result = compiled(*args, **kwargs)
            _run_backward(result)
    plans = {built.name: built.plan for built in seen}
    new = RECORDER.begun - before
    calls = [(plans.get(timeline.program), timeline) for timeline in last_timelines()[-new:]] if new else []
    text = json.dumps({"traceEvents": trace_events(calls), "displayTimeUnit": "ms"})
    Path(str(path).replace("{rank}", str(process_rank()))).write_text(text)
    return result


def _run_backward(result: Any) -> None:
    """Gradients of all tensors in ``result`` by all leaves below them, computed and dropped."""
    found = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
    leaves = list({id(leaf): leaf for t in found for leaf in _leaves(t)}.values())
    if leaves:
        ones = [torch.ones_like(t) for t in found]
        torch.autograd.grad(found, leaves, ones, retain_graph=True, allow_unused=True)


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose ``.grad`` a backward pass from ``tensor`` would fill."""
    leaves: list[torch.Tensor] = []
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    return leaves


@dataclass(frozen=True)
class CommunicationSummary:
    """Measured communication of the recorded calls of compiled programs.

    Attributes:
        total_us: time with at least one collective in flight, as the backend reported its end.
        exposed_us: time the program stood still for it.
        calls: recorded calls that communicated.
    """

    total_us: float
    exposed_us: float
    calls: int

    @property
    def hidden_share(self) -> float:
        """Part of ``total_us`` during which the program computed, 0 to 1."""
        return max(0.0, 1.0 - self.exposed_us / self.total_us) if self.total_us else 0.0


def communication_summary() -> CommunicationSummary | None:
    """How much communication the last calls hid.

    None unless the programs were compiled with ``Options(timeline=True)`` and communicate.
    """
    lines = [t for t in last_timelines() if t.communication_us]
    if not lines:
        return None
    return CommunicationSummary(sum(t.communication_us for t in lines), sum(t.exposed_us for t in lines), len(lines))
