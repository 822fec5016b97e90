"""All ranks' output in one file, line by line as it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

MERGED = "merged.log"
POLL_S = 0.2
LONGEST_LINE = 1 << 16
"""Characters without a line end after which a line is passed on all the same."""


class Follower:
    """Follows the files ``<folder>/<run>_*/attempt_<n>/<rank>/{stdout,stderr}.log``, which appear and grow.

    Args:
        out: receives lines such as ``12:03:04.567 rank 1 attempt 0 stderr | text``.
    """

    def __init__(self, folder: Path, run: str, out: TextIO) -> None:
        self._folder, self._run, self._out = folder, run, out
        self._read: dict[Path, int] = {}
        self._rest: dict[Path, str] = {}

    def poll(self, last: bool = False) -> int:
        """Pass on what is new; unfinished lines wait unless this is the ``last`` time. Returns the lines passed on."""
        passed = 0
        for path in sorted(self._folder.glob(f"{self._run}_*/attempt_*/*/std*.log")):
            at = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(at)
                found = file.read()
            self._read[path] = at + len(found)
            text = self._rest.get(path, "") + found.decode(errors="replace")
            *lines, rest = text.split("\n")
            if rest and (last or len(rest) > LONGEST_LINE):
                lines.append(rest)
                rest = ""
            self._rest[path] = rest
            clock = time.strftime("%H:%M:%S") + f".{time.time_ns() // 1_000_000 % 1000:03}"
            attempt, rank = path.parent.parent.name.removeprefix("attempt_"), path.parent.name
            for line in lines:
                self._out.write(f"{clock} rank {rank} attempt {attempt} {path.stem} | {line}\n")
            passed += len(lines)
        if passed:
            self._out.flush()
        return passed


@contextmanager
def merged(folder: Path, run: str) -> Iterator[Path]:
    """While the block runs, ``folder/merged.log`` grows with every line that a rank writes to its own files."""
    path = folder / MERGED
    stop = threading.Event()
    with path.open("a") as out:
        follower = Follower(folder, run, out)

        def follow() -> None:
            while not stop.wait(POLL_S):
                follower.poll()

        thread = threading.Thread(target=follow, name="dcompile-merged-log", daemon=True)
        thread.start()
        try:
            yield path
        finally:
            stop.set()
            thread.join()
            follower.poll(last=True)
