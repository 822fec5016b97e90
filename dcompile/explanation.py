"""``dcompile.explain``: what became of a function, graph by graph; and how much communication the last steps hid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dcompile.backend import backend
from dcompile.capture import graph_breaks
from dcompile.ir.nodes import Extern
from dcompile.options import Options
from dcompile.pipeline import Built
from dcompile.plan import Plan
from dcompile.runtime.timeline import last_timelines
from dcompile.watch import describe_memory, describe_schedule, describe_verdicts


@dataclass(frozen=True)
class GraphExplanation:
    """One compiled graph.

    Attributes:
        built: the texts of both generated programs and the compile time by stage.
        plan: the verified program: schedule, places, predicted times, decisions.
    """

    built: Built
    plan: Plan

    @property
    def name(self) -> str:
        """``"forward0"``, ``"backward0"``, ``"inference1"``, …"""
        return self.built.name

    @property
    def fallbacks(self) -> Counter[str]:
        """Library calls made for want of a lowering rule, by op."""
        return Counter(n.op for n in self.plan.graph.nodes if isinstance(n, Extern) and n.fallback)

    @property
    def library_calls(self) -> Counter[str]:
        """All library calls, by op."""
        return Counter(n.op for n in self.plan.graph.nodes if isinstance(n, Extern))

    def __str__(self) -> str:
        calls = self.built.kernels.calls if self.built.kernels else {}
        distinct = len({call.function for call in calls.values()})
        parts = [
            f"== {self.name}: {len(calls)} kernel launches of {distinct} kernels, "
            f"{sum(self.library_calls.values())} library calls, compiled in {sum(self.built.seconds.values()):.2f} s",
            describe_schedule(self.plan),
            describe_memory(self.plan).splitlines()[0],
            "library calls: " + _counted(self.library_calls),
            "fallbacks: " + _counted(self.fallbacks),
            "kernels:",
        ]
        for position, call in sorted(calls.items()):
            origin = self.plan.graph.nodes[position].origin
            parts.append(f"  {position:4d} {call.function}  {', '.join(origin.ops)[:120]}  {origin.source}")
        return "\n".join(parts)

    @property
    def decisions(self) -> str:
        """Every decision with its reason, a line each."""
        return describe_verdicts(self.plan.verdicts)


@dataclass(frozen=True)
class Explanation:
    """All graphs of one function.

    Attributes:
        result: what the function returned.
        graph_breaks: times capture had to leave the function.
    """

    graphs: tuple[GraphExplanation, ...]
    graph_breaks: int
    result: Any

    @property
    def fallbacks(self) -> Counter[str]:
        return sum((graph.fallbacks for graph in self.graphs), Counter())

    def __str__(self) -> str:
        head = f"{len(self.graphs)} graphs, {self.graph_breaks} graph breaks, fallbacks: {_counted(self.fallbacks)}"
        return "\n\n".join([head, *map(str, self.graphs)])


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(names.items())) or "none"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``function`` for these arguments, run it once, and tell what was made of it.

    The function runs for real, its side effects included. The disk cache is left out, so that every stage is seen. The
    backward graph is included when an output requires a gradient.
    """
    seen: list[Built] = []
    options = replace(Options.from_env(), cache_dir=None)
    before = graph_breaks()
    result = torch.compile(function, backend=backend(options, seen.append))(*args, **kwargs)
    graphs = tuple(GraphExplanation(built, built.plan) for built in seen if built.plan is not None)
    return Explanation(graphs, graph_breaks() - before, result)


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
