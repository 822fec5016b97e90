"""Watches collectives on CUDA, where a wait only orders a stream: a thread asks the device and ends jobs that hang."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dcompile.errors import DeadlineExceeded
from dcompile.options import process_rank
from dcompile.runtime.board import Board, board
from dcompile.runtime.flights import FLIGHTS, Flight
from dcompile.runtime.last_words import DEADLINE_EXIT, end_now, end_with
from dcompile.runtime.waits import report

WATCH_EVERY_S = 1.0
"""Between two rounds; a hang is measured in minutes."""

GRACE_S = 3.0
"""Time for the others' watchdogs to say what they wait for: they go round every second."""

_lock = threading.Lock()
_thread: threading.Thread | None = None


def watch_cuda(flight: Flight, deadline_s: float, flight_dir: Path | None) -> None:
    """Have ``flight``, whose stream has been ordered, ended in the record when the device gets there.

    A flight that does not end in ``deadline_s`` ends the process: reported on standard error, exit code
    ``DEADLINE_EXIT``. While a CUDA graph is captured nothing runs, so nothing is watched.
    """
    if torch.cuda.is_current_stream_capturing():
        FLIGHTS.end(flight)
        return
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    flight.works = (event,)
    _start(deadline_s, flight_dir)


def _start(deadline_s: float, flight_dir: Path | None) -> None:
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(
                target=_watch, args=(deadline_s, flight_dir), name="dcompile-watchdog", daemon=True
            )
            _thread.start()


def _watch(deadline_s: float, flight_dir: Path | None) -> None:
    while True:
        time.sleep(WATCH_EVERY_S)
        if (late := first_late(deadline_s)) is not None:
            here = board()
            if here is not None:
                here.post(here.blocked("waits", late.name, late.group, late.number, late.ranks))
                time.sleep(GRACE_S)
            error = end_with(DeadlineExceeded(describe(late, deadline_s, here)), flight_dir)
            sys.stderr.write("\n".join([f"DeadlineExceeded: {error}", *error.__notes__]) + "\n")
            end_now(DEADLINE_EXIT)


def first_late(deadline_s: float) -> Flight | None:
    """The oldest flight that has not ended and is older than ``deadline_s``; those that have ended are recorded."""
    for flight in FLIGHTS.flying():
        if all(event.query() for event in flight.works):
            FLIGHTS.end(flight)
        elif time.time_ns() - flight.launched_ns > deadline_s * 1e9:
            return flight
    return None


def describe(flight: Flight, deadline_s: float, here: Board | None) -> str:
    """The report of a collective that hangs: rank, collective, IR name, source line, and what the others do."""
    lines = [
        f"rank {process_rank()}: {flight.name} on group {flight.group!r}, number {flight.number} there, "
        f"did not end within {deadline_s:g} s"
    ]
    if here is not None:
        lines.append(report(tuple(rank for rank in flight.ranks if rank != here.rank), here.read()))
    return "\n".join(lines)
