"""How a job that cannot go on ends: by name, with an exit code of its own, and without waiting for what never comes.

A process that leaves an unfinished collective behind would wait for its backend's threads when it ends, up to the
backend's own timeout (half an hour). So an error of these kinds that nobody catches ends the process at once, after its
traceback and its exit functions.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from dcompile.errors import DCompileError, DeadlineExceeded, Divergence, PeerGone
from dcompile.options import process_rank
from dcompile.runtime.flights import FLIGHTS

DEADLINE_EXIT, DIVERGENCE_EXIT, PEER_GONE_EXIT, COLLECTIVE_EXIT = 90, 91, 92, 93
"""Exit codes of a process that ends by ``DeadlineExceeded``, ``Divergence``, ``PeerGone`` or a failed collective;
outside what shells, signals (129 on) and ``sysexits.h`` (64 to 78) use."""

EXIT_FUNCTIONS_S = 5.0
"""How long the exit functions of a process that must end may take."""

_fatal: list[DCompileError] = []


def end_with(error: DCompileError, flight_dir: Path | None) -> DCompileError:
    """``error``, which the caller raises: the process ends with its exit code if nobody catches it.

    The flight recorder is dumped into ``flight_dir``; the error says where.
    """
    if flight_dir is not None:
        try:
            path = FLIGHTS.dump(flight_dir, process_rank())
            error.add_note(f"flight recorder: {path} (see python -m torch.distributed.flight_recorder.fr_trace -h)")
        except OSError as problem:
            error.add_note(f"the flight recorder could not be written: {problem}")
    if not _fatal:
        _chain_hook()
    _fatal.append(error)
    return error


def exit_code(error: BaseException | None) -> int | None:
    """The exit code of ``error`` or of what it was raised from; None if it is none of ours."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(error is fatal for fatal in _fatal):
            if isinstance(error, DeadlineExceeded):
                return DEADLINE_EXIT
            if isinstance(error, Divergence):
                return DIVERGENCE_EXIT
            return PEER_GONE_EXIT if isinstance(error, PeerGone) else COLLECTIVE_EXIT
        error = error.__cause__ or error.__context__
    return None


def _chain_hook() -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> Any:
        before(kind, error, where)
        if (code := exit_code(error)) is not None:
            end_now(code)

    sys.excepthook = hook


def end_now(code: int) -> None:
    """End this process with ``code``: exit functions run, for a while; threads are not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    functions = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    functions.start()
    functions.join(EXIT_FUNCTIONS_S)
    os._exit(code)
