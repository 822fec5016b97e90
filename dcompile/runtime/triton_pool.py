"""Triton kernels compiled side by side: in processes of their own where there are cores for them, else in threads."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from dcompile.runtime import triton_worker

LEAST_CORES, MOST_WORKERS = 8, 16
"""Cores from which processes pay: most of a compile holds the interpreter's lock, a worker starts in half a second."""

LEAST_JOBS = 4
"""Fewer are compiled before a worker has started."""


@dataclass(frozen=True)
class Job:
    """One function to compile, as ``triton_worker.cubin_of`` takes it.

    Attributes:
        path: of the printed module.
        out: file that receives the cubin.
    """

    path: str
    out: str
    name: str
    buffers: tuple[str, ...]
    sizes: int
    blocks: dict[str, int]
    num_warps: int
    capability: int
    aligned: bool = True


Answer = int | str
"""Bytes of dynamic shared memory, or why Triton rejects a function."""


def compile_jobs(jobs: Sequence[Job], cores: int | None = None) -> list[Answer]:
    """Compile all ``jobs``, as many at once as there are cores."""
    count = cores or len(os.sched_getaffinity(0))
    processes = count >= LEAST_CORES and len(jobs) >= LEAST_JOBS
    workers = min(len(jobs), MOST_WORKERS, max(count - 1, 1)) if processes else min(len(jobs), count)
    one = _workers().compile if processes else _Here().compile
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="dcompile-triton") as pool:
        return list(pool.map(one, jobs))


class _Here:
    """Compiles in this process; the module is imported once."""

    def __init__(self) -> None:
        self._module: Callable[[str], ModuleType] = lru_cache(maxsize=1)(
            lambda path: triton_worker.module_at(Path(path))
        )

    def compile(self, job: Job) -> Answer:
        options = asdict(job)
        path, out = options.pop("path"), options.pop("out")
        try:
            cubin, shared_bytes = triton_worker.cubin_of(self._module(path), **options)
        except Exception as error:  # Triton has no common base class of errors
            return f"{type(error).__name__}: {error}"
        Path(out).write_bytes(cubin)
        return shared_bytes


class _Workers:
    """Processes that are started when there is more to do than they can, and end by themselves when idle."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._here = _Here()

    def compile(self, job: Job) -> Answer:
        """By a worker, or here if it dies of the job."""
        worker = self._take()
        if worker is None or worker.stdin is None or worker.stdout is None:
            return self._here.compile(job)
        line = ""
        with suppress(OSError):
            worker.stdin.write(json.dumps(asdict(job)) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        if not line:
            worker.kill()
            worker.wait()
            return self._here.compile(job)
        self._idle.put(worker)
        answer = json.loads(line)
        return str(answer["error"]) if "error" in answer else int(answer["shared_bytes"])

    def _take(self) -> subprocess.Popen[str] | None:
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.poll() is None:
                    return worker
        command = [sys.executable, "-P", triton_worker.__file__]
        with suppress(OSError):
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return None


@lru_cache(maxsize=1)
def _workers() -> _Workers:
    return _Workers()


os.register_at_fork(after_in_child=_workers.cache_clear)

__all__ = ["Answer", "Job", "compile_jobs"]
