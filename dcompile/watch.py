"""Eyes on the pipeline: what each pass took, changed and decided, printed (``show``) or in files (``dump_dir``)."""

from __future__ import annotations

import difflib
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dcompile.collectives.text import print_graph
from dcompile.counters import TALLY
from dcompile.ir.graph import Graph
from dcompile.options import Options, process_rank
from dcompile.plan import Plan, Verdict


@contextmanager
def collector_rests() -> Iterator[None]:
    """Python's cycle collector does not run in the block. A pass makes hundreds of thousands of objects that live and
    hardly a cycle: looking through them again and again was a third of the time of scheduling 10,000 nodes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass
class Watch:
    """Follows one graph through the pipeline.

    Files go to ``dump_dir/rank<r>/<graph name>/<nn>-<stage>.<ending>``.
    """

    options: Options
    name: str
    stages: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage for ``counters().seconds`` and ``show=passes``; the collector rests meanwhile."""
        began = time.perf_counter()
        with TALLY.timed(name), collector_rests():
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def graph(self, stage: str, before: Graph | None, after: Graph) -> None:
        """Show and dump ``after``, as a difference to ``before`` when there is one."""
        took = self.seconds.get(stage, 0.0) * 1e3
        self._print("passes", f"{self.name}: {stage:<20} {len(after.nodes):5d} nodes {took:8.1f} ms")
        wants_ir = "ir" in self.options.show
        if not wants_ir and self.options.dump_dir is None:
            return
        text = print_graph(after)
        if wants_ir:
            old = print_graph(before).splitlines() if before is not None else []
            shown = text if before is None else "\n".join(difflib.unified_diff(old, text.splitlines(), "before", stage))
            self._print("ir", shown or f"{stage}: nothing changed")
        self.text(stage, text, "ir")

    def text(self, stage: str, text: str, ending: str) -> None:
        """Dump one text."""
        if self.options.dump_dir is not None:
            folder = Path(self.options.dump_dir) / f"rank{process_rank()}" / self.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.stages:02d}-{stage}.{ending}").write_text(text)
            self.stages += 1

    def code(self, kernels: str, host: str) -> None:
        """The two generated programs."""
        self._print("code", f"{kernels}\n{host}")
        self.text("kernels", kernels, "cpp")
        self.text("host", host, "py")

    def plan(self, plan: Plan) -> None:
        """Memory, predicted timeline and verdicts of the finished plan."""
        self._print("memory", describe_memory(plan))
        self._print("timeline", describe_schedule(plan))
        verdicts = describe_verdicts(plan.verdicts)
        self._print("verdicts", verdicts)
        self.text("plan", "\n".join((describe_schedule(plan), describe_memory(plan), verdicts)), "txt")

    def _print(self, what: str, text: str) -> None:
        if what in self.options.show and process_rank() == 0:
            sys.stderr.write(f"[dcompile {what}] {text}\n")


def describe_verdicts(verdicts: tuple[Verdict, ...]) -> str:
    """One line a decision."""
    return "\n".join(f"{v.stage}: {v.subject}: {v.decision} ({v.reason})" for v in verdicts)


def describe_memory(plan: Plan) -> str:
    """Every storage with its home, bytes and place."""
    arenas = ", ".join(f"{device} {nbytes:,}" for device, nbytes in plan.arena_bytes.items()) or "none"
    lines = [f"peak {plan.peak_bytes:,} bytes; arenas: {arenas}"]
    for storage in plan.storages.values():
        at = "" if storage.arena_offset is None else f" at {storage.arena_offset:,}"
        inside = [name for name, slot in plan.slots.items() if slot.storage == storage.name and name != storage.name]
        also = f"  also {', '.join(inside)}" if inside else ""
        lines.append(f"  {storage.home.value:<8}{storage.name:<28}{storage.nbytes!s:>12} bytes{at}{also}")
    return "\n".join(lines)


def describe_schedule(plan: Plan) -> str:
    """Steps in execution order with predicted microseconds, and why collectives are exposed."""
    prediction = plan.prediction
    lines: list[str] = []
    times = {i.position: i for i in prediction.intervals if i.lane == "compute"} if prediction else {}
    for position, node in enumerate(plan.graph.nodes):
        when = times.get(position)
        clock = f"{when.start_us:10.1f} {when.end_us - when.start_us:9.1f} us" if when else " " * 23
        names = ", ".join(d.name for d in node.defs)
        what = type(node).__name__.lower()
        detail = getattr(node, "op", None) or getattr(getattr(node, "kind", None), "value", "")
        lines.append(f"  {position:4d} {clock}  {what:<7}{detail:<24}{names}  {node.origin.source}")
    if prediction is not None:
        lines.insert(
            0,
            f"{plan.graph.name}: predicted {prediction.makespan_us:.0f} us, program order "
            f"{prediction.program_order_us:.0f} us, lower bound {prediction.lower_bound_us:.0f} us",
        )
        for e in prediction.exposures:
            lines.append(f"  {e.pending}: {e.exposed_us:.0f} of {e.total_us:.0f} us exposed: {e.reason}")
    return "\n".join(lines)
