"""Measured times of a program's steps: what ran when, and how much communication was hidden under compute."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEPT_CALLS = 64
"""Timelines kept by ``last_timelines``: a few steps of forward and backward, small enough to forget about."""


@dataclass(frozen=True)
class Span:
    """One step or one collective, in microseconds from the start of the call.

    Attributes:
        lane: ``"compute"``, or ``"wait"`` for standing still, or a group label for a collective from launch to end.
    """

    name: str
    lane: str
    start_us: float
    end_us: float

    @property
    def duration_us(self) -> float:
        return self.end_us - self.start_us


@dataclass
class Timeline:
    """One call of a program. ``start_s`` is ``time.perf_counter()`` at its start."""

    program: str
    start_s: float
    spans: list[Span] = field(default_factory=list)

    @property
    def exposed_us(self) -> float:
        """Time the program stood still for communication (in waits; the launches count as compute)."""
        return sum(span.duration_us for span in self.spans if span.lane == "wait")

    @property
    def communication_us(self) -> float:
        """Time during which at least one collective was in flight, as the backend reported its end."""
        flights = sorted((s.start_us, s.end_us) for s in self.spans if s.lane not in ("compute", "wait"))
        total, covered = 0.0, 0.0
        for start, end in flights:
            total += max(0.0, end - max(start, covered))
            covered = max(covered, end)
        return total

    @property
    def hidden_us(self) -> float:
        """Communication under compute: ``communication_us - exposed_us``, not below 0."""
        return max(0.0, self.communication_us - self.exposed_us)

    @property
    def hidden_share(self) -> float | None:
        """``hidden_us / communication_us``; None without communication."""
        return self.hidden_us / self.communication_us if self.communication_us else None

    @property
    def total_us(self) -> float:
        return max((span.end_us for span in self.spans), default=0.0)

    def chrome_trace(self) -> str:
        """The timeline as Chrome trace JSON (chrome://tracing, Perfetto)."""
        lanes = list(dict.fromkeys(["compute", "wait", *(span.lane for span in self.spans)]))
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": n, "args": {"name": lane}}
            for n, lane in enumerate(lanes)
        ]
        for span in self.spans:
            events.append(
                {"ph": "X", "name": span.name, "cat": self.program, "pid": 0, "tid": lanes.index(span.lane)}
                | {"ts": span.start_us, "dur": span.duration_us}
            )
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def save(self, path: Path) -> None:
        """Write ``chrome_trace`` to ``path``."""
        path.write_text(self.chrome_trace())


class Clock:
    """Records one call. ``tick(n)`` marks the end of step n, whose start is the tick before it."""

    __slots__ = ("_last", "_lock", "_steps", "timeline")

    def __init__(self, timeline: Timeline, steps: Sequence[tuple[str, str]]) -> None:
        self.timeline = timeline
        self._steps = steps
        self._last = 0.0
        self._lock = threading.Lock()

    def now_us(self) -> float:
        return (time.perf_counter() - self.timeline.start_s) * 1e6

    def tick(self, step: int) -> None:
        """Step ``step`` ends now."""
        now = self.now_us()
        name, lane = self._steps[step]
        with self._lock:
            self.timeline.spans.append(Span(name, lane, self._last, now))
        self._last = now

    def watch(self, lane: str, name: str, when_done: Callable[[Callable[[], None]], None]) -> None:
        """A collective has been launched since the last tick; ``when_done(report)`` must call ``report`` at its end."""
        started = self._last

        def report() -> None:
            with self._lock:
                self.timeline.spans.append(Span(name, lane, started, self.now_us()))

        when_done(report)


class Recorder:
    """Keeps the timelines of the last ``KEPT_CALLS`` calls; ``begun`` counts all."""

    def __init__(self, kept: int = KEPT_CALLS) -> None:
        self.timelines: deque[Timeline] = deque(maxlen=kept)
        self.begun = 0

    def begin(self, program: str, steps: Sequence[tuple[str, str]]) -> Clock:
        """Start a timeline; it is listed at once and filled as the call runs."""
        timeline = Timeline(program, time.perf_counter())
        self.timelines.append(timeline)
        self.begun += 1
        return Clock(timeline, steps)


RECORDER = Recorder()
"""The process's recorder: where executables compiled with ``Options(timeline=True)`` record."""


def last_timelines() -> list[Timeline]:
    """The most recent calls of programs that record, oldest first."""
    return list(RECORDER.timelines)
