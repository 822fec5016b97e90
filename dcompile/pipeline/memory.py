"""What captured graphs became, kept in the cache folder beside their programs (see ``capture.memory``)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from dcompile.capture import Boxed, Unsuited
from dcompile.counters import TALLY
from dcompile.errors import DCompileError, ToolchainError
from dcompile.options import Options
from dcompile.pipeline.prices import rounds_to_tf32
from dcompile.pipeline.program import Built, Reference, Users, cache_of, recall_program
from dcompile.runtime.cache import cache_key
from dcompile.runtime.comm import known_group_size
from dcompile.runtime.compiled import VANISHED, Loaded, own_sources
from dcompile.runtime.once import Building, meeting_place
from dcompile.runtime.toolchain import compiler_fingerprint
from dcompile.runtime.triton_kernels import triton_fingerprint

ENTRY = "capture.pickle"


def memory_for(options: Options, users: Users) -> ProgramMemory | None:
    """Where graphs captured with these options are remembered; None if they are to be seen on their way, or frozen."""
    if options.cache_dir is None or options.show or options.dump_dir is not None or options.freeze:
        return None
    return ProgramMemory(options, users)


class ProgramMemory:
    """``capture.Memory`` for one graph that Dynamo hands over.

    Args:
        users: how many hold a tensor's storage, for CUDA graphs.
    """

    def __init__(self, options: Options, users: Users) -> None:
        self._options, self._users = options, users
        self._cache = cache_of(options)
        self._place = meeting_place(self._cache) if options.compile_once else None
        self._built: dict[int, Built] = {}
        self._sharing: Building | None = None

    @property
    def salt(self) -> str:
        """See ``capture.Memory``."""
        chosen = self._options
        flags = (chosen.timeline, chosen.tracebacks, chosen.cuda_graphs, rounds_to_tf32())
        try:
            cxx: Any = compiler_fingerprint(chosen.cxx)
        except (ToolchainError, OSError):
            cxx = None
        gpu = triton_fingerprint() if torch.cuda.is_available() else None
        return cache_key("capture", own_sources(), chosen.affects_code(), flags, cxx, gpu)

    def group_size(self, name: str) -> int | None:
        """See ``capture.Memory``."""
        return known_group_size(name)

    def compiled(self, built: Built) -> None:
        """A program of the graph, told before it is asked for by ``reference``."""
        self._built[id(built.run)] = built

    def reference(self, program: Boxed) -> Reference:
        """See ``capture.Memory``."""
        found = self._built[id(program)].reference
        if isinstance(found, str):
            raise Unsuited(found)
        return found

    def program(self, reference: Any, name: str) -> Boxed | None:
        """See ``capture.Memory``."""
        built = recall_program(reference, name, self._options, self._users)
        return None if built is None else built.run

    def find(self, key: str) -> bytes | None:
        """See ``capture.Memory``. Waits for another rank that captures the same graph at this moment."""
        entry = self._cache.find(key)
        if entry is None and self._place is not None:
            self._sharing = self._place.join(key)
            if self._sharing is None:
                with TALLY.timed("wait for another rank"):
                    entry = self._place.receive(key, self._cache, self._options.deadline_s)
        elif entry is not None and self._place is not None:
            self._place.offer(key, entry)
        if entry is None:
            return None
        with contextlib.suppress(OSError):
            return (entry / ENTRY).read_bytes()
        return None

    def keep(self, key: str, entry: bytes | None, programs: Sequence[Boxed]) -> None:
        """See ``capture.Memory``."""
        sharing, self._sharing = self._sharing, None
        loading = [self._built[id(program)].loaded for program in programs if id(program) in self._built]
        if entry is None or len(loading) < len(programs):
            if sharing is not None:
                sharing.finish(None)
            return
        _Storing(self, key, entry, sharing, [one for one in loading if one is not None]).begin()

    def offer(self, program: Loaded) -> None:
        """Send a program to ranks that do not share this rank's folder, if it was not made or sent in this run."""
        if self._place is not None:
            self._place.offer(program.folder.name, program.folder)

    def store(self, key: str, entry: bytes) -> Path | None:
        """Put an entry in its place; None if the folder cannot be used."""
        with contextlib.suppress(OSError, DCompileError, *VANISHED):
            return self._cache.fetch(key, lambda folder: _write(folder / ENTRY, entry))
        return None


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


class _Storing:
    """Stores an entry when the last of its programs is built, in the thread that built it."""

    def __init__(
        self,
        memory: ProgramMemory,
        key: str,
        entry: bytes,
        sharing: Building | None,
        loading: Sequence[Future[Loaded]],
    ) -> None:
        self._memory, self._key, self._entry, self._sharing = memory, key, entry, sharing
        self._loading = loading
        self._left = len(loading)
        self._lock = threading.Lock()

    def begin(self) -> None:
        if not self._loading:
            self._finish()
        for one in self._loading:
            one.add_done_callback(self._done)

    def _done(self, _: Future[Loaded]) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        built = all(one.exception() is None for one in self._loading)
        entry = self._memory.store(self._key, self._entry) if built else None
        if self._sharing is not None:
            if entry is not None:
                for one in self._loading:
                    self._memory.offer(one.result())
            self._sharing.finish(entry)
