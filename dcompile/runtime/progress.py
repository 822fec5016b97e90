"""What this rank is compiling, in a small file for whoever started it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

EVERY_S = 0.5

_lock = threading.Lock()
_thread: threading.Thread | None = None


def report_progress(folder: Path, rank: int, stage: Callable[[], str]) -> None:
    """Keep ``folder/<rank>`` saying what ``stage()`` says until it says ""; then the file goes. Returns at once.

    A folder that cannot be written is left alone: the line is a courtesy.
    """
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            path = folder / str(rank)
            _thread = threading.Thread(target=_report, args=(path, stage), name="dcompile-progress", daemon=True)
            _thread.start()


def _report(path: Path, stage: Callable[[], str]) -> None:
    wake = threading.Event()
    with contextlib.suppress(OSError):
        while text := stage():
            path.write_text(text)
            wake.wait(EVERY_S)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
