"""A line on the terminal while ranks compile.

Ranks write what they are compiling into one small file each, ``$DCOMPILE_PROGRESS_DIR/<rank>``, and remove it when they
are through; the launcher shows the files. Neither side knows more of the other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

VARIABLE = "DCOMPILE_PROGRESS_DIR"
POLL_S = 0.3
PLAIN_EVERY_S = 10.0
"""Between two lines where standard error is no terminal, so that logs stay short."""

SHOWN_RANKS = 4


def stages(folder: Path) -> dict[int, str]:
    """What each rank that compiles is doing."""
    found: dict[int, str] = {}
    for path in sorted(folder.glob("[0-9]*")):
        try:
            text = path.read_text().strip()
        except OSError:
            continue  # the rank has just removed it
        if text and path.name.isdecimal():
            found[int(path.name)] = text
    return found


def line(found: Mapping[int, str], seconds: float) -> str:
    """``compiling for 12 s: rank 0 fuse, rank 1 c++ compiler, and 6 more``; "" when nobody compiles."""
    if not found:
        return ""
    shown = [f"rank {rank} {stage}" for rank, stage in sorted(found.items())[:SHOWN_RANKS]]
    more = [f"and {len(found) - SHOWN_RANKS} more"] if len(found) > SHOWN_RANKS else []
    return f"compiling for {seconds:.0f} s: {', '.join([*shown, *more])}"


@contextmanager
def shown(folder: Path, out: TextIO | None = None) -> Iterator[None]:
    """While the block runs, what ranks compile is shown: one changing line in a terminal, else a line now and then."""
    stream = out if out is not None else sys.stderr
    stop = threading.Event()

    def show() -> None:
        began: float | None = None
        printed, width = 0.0, 0
        while not stop.wait(POLL_S):
            found = stages(folder)
            now = time.monotonic()
            began = (began if began is not None else now) if found else None
            text = line(found, now - began) if began is not None else ""
            if stream.isatty():
                if text or width:
                    stream.write("\r" + text.ljust(width) + ("" if text else "\r"))
                    stream.flush()
                width = len(text)
            elif text and began is not None and now - max(began, printed) > PLAIN_EVERY_S:
                stream.write(text + "\n")
                stream.flush()
                printed = now

    thread = threading.Thread(target=show, name="dcompile-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
