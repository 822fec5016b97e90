"""What compiling has done in this process so far."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Counters:
    """A snapshot.

    Attributes:
        graphs: graphs handed to the compiler.
        graph_breaks: times capture had to leave a function and go on in a new graph.
        kernels: kernels generated, identical ones counted once a graph.
        kernel_launches: kernel launches in one call of every graph.
        library_calls: library calls in one call of every graph, fallbacks included.
        collectives: collectives started in one call of every graph.
        fallbacks: library calls made for want of a lowering rule, by op name.
        cache_hits, cache_misses: graphs loaded from, and not found in, the disk cache.
        captures_recalled: graphs of Dynamo's whose programs were found without tracing them through AOTAutograd.
        captures_refused: graphs that always have to be traced, by reason.
        seconds: wall seconds by stage; a stage inside another one counts only for itself.
        stage: what is being compiled at this moment (``"fuse"``, ``"c++ compiler"``), ``""`` when nothing is.
    """

    graphs: int = 0
    graph_breaks: int = 0
    kernels: int = 0
    kernel_launches: int = 0
    library_calls: int = 0
    collectives: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    cache_misses: int = 0
    captures_recalled: int = 0
    captures_refused: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    stage: str = ""


_LOG = logging.getLogger("dcompile")
_OWN_OPS = ("aten.", "prims.")
"""Ops that could have a rule. Others are the user's own: that they stay library calls is what was asked for."""


class Tally:
    """The running totals behind ``dcompile.counters()``; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Counters()
        self._stages: list[str] = []
        self._told: set[str] = set()
        self._open = threading.local()  # seconds spent in inner blocks, for each block this thread is in

    def add(self, **amounts: int) -> None:
        with self._lock:
            self._now = replace(self._now, **{name: getattr(self._now, name) + n for name, n in amounts.items()})

    def add_fallbacks(self, names: Counter[str]) -> None:
        with self._lock:
            for name in names.keys() - self._told:
                self._told.add(name)
                _LOG.log(
                    logging.WARNING if name.startswith(_OWN_OPS) else logging.INFO,
                    "%s has no lowering rule and stays a library call (said once)",
                    name,
                )
            self._now = replace(self._now, fallbacks=self._now.fallbacks + names)

    def add_refusal(self, reason: str) -> None:
        """Count a graph that cannot be recalled."""
        with self._lock:
            self._now = replace(self._now, captures_refused=self._now.captures_refused + Counter({reason: 1}))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to ``seconds[stage]``; meanwhile ``stage`` is what snapshots show."""
        inner: list[float] = self._open.__dict__.setdefault("inner", [])
        inner.append(0.0)
        with self._lock:
            self._stages.append(stage)
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            own = took - inner.pop()
            if inner:
                inner[-1] += took
            with self._lock:
                self._stages.remove(stage)
                self._now.seconds[stage] += own  # type: ignore[assignment]

    def snapshot(self) -> Counters:
        with self._lock:
            now = self._now
            stage = self._stages[-1] if self._stages else ""
            tables: dict[str, Any] = {
                name: Counter(getattr(now, name)) for name in ("fallbacks", "captures_refused", "seconds")
            }
            return replace(now, **tables, stage=stage)

    def reset(self) -> None:
        with self._lock:
            self._now = Counters()


TALLY = Tally()
"""The process's totals."""
