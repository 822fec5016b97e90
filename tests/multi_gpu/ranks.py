"""Run a function on several ranks, each a process of its own, and never hang."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dcompile.runtime.comm import never_ended


class RankFailed(AssertionError):
    """A rank raised, died, or did not finish in time; carries the tracebacks of the ranks that raised."""


def run_ranks(
    fn: Callable[..., Any], *args: Any, world: int = 2, backend: str = "gloo", deadline_s: float = 90.0
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world`` ranks joined in one default process group over the loopback interface.

    Args:
        fn: a function at the top level of a module, so that a new process can import it.
        args: picklable; the same on all ranks.
        backend: process-group backend; with ``"nccl"`` each rank's current device is the GPU of its number.
        deadline_s: seconds until all ranks are killed. Collectives time out a little earlier and say which.

    Returns:
        What each rank returned, in rank order. Results travel through ``torch.save``.

    Raises:
        RankFailed: with the traceback of every rank that raised, or the ranks that were still running at the deadline.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="dcompile-ranks-") as folder:
        port = free_port()
        processes = [
            context.Process(
                target=_rank_main,
                args=(fn, args, rank, world, backend, port, folder, deadline_s, dict(os.environ)),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            running = _join(processes, deadline_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return _collect(processes, Path(folder), running, deadline_s)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        exit_code: of its process, negative for a signal; None if it was still there at the deadline and was killed.
        result: what it returned; None if it did not.
        error: its traceback; "" if it raised nothing.
        seconds: from the start of all ranks to its end.
    """

    exit_code: int | None
    result: Any
    error: str
    seconds: float


def drill(
    fn: Callable[..., Any],
    *args: Any,
    world: int = 2,
    deadline_s: float = 90.0,
    still: int | None = None,
    backend: str = "gloo",
) -> list[Outcome]:
    """``run_ranks`` for ranks that are meant to come to grief: how each of them ended, at the latest at the deadline.

    Nobody is killed because another rank failed. Rank ``still`` is not expected to end (it was stopped, say): it is
    killed when the others have ended.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="dcompile-drill-") as folder:
        port = free_port()
        processes = [
            context.Process(
                target=_rank_main,
                args=(fn, args, rank, world, backend, port, folder, deadline_s, dict(os.environ), False),
                daemon=True,
            )
            for rank in range(world)
        ]
        began = time.monotonic()
        for process in processes:
            process.start()
        ended: dict[int, float] = {}
        while len(ended) < world and time.monotonic() - began < deadline_s:
            for rank, process in enumerate(processes):
                if not process.is_alive():
                    ended.setdefault(rank, time.monotonic() - began)
            if len(ended) == world - 1 and still not in (None, *ended):
                break
            time.sleep(0.02)
        found = []
        for rank, process in enumerate(processes):
            error, result = Path(folder, f"error{rank}"), Path(folder, f"result{rank}")
            found.append(
                Outcome(
                    process.exitcode,
                    torch.load(result, weights_only=False) if result.exists() else None,
                    error.read_text() if error.exists() else "",
                    ended.get(rank, time.monotonic() - began),
                )
            )
        for process in processes:
            process.kill()
            process.join()
        return found


def _join(processes: list[Any], deadline_s: float) -> list[int]:
    """Wait for all ranks; after one fails the others get two seconds to fail too. Returns the ranks still running."""
    end = time.monotonic() + deadline_s
    failed_at: float | None = None
    while time.monotonic() < end:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        if not running:
            return []
        if failed_at is None and any(process.exitcode not in (None, 0) for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > 2.0:
            return running
        time.sleep(0.02)
    return [rank for rank, process in enumerate(processes) if process.is_alive()]


def _collect(processes: list[Any], folder: Path, running: list[int], deadline_s: float) -> list[Any]:
    errors = [
        f"rank {rank}:\n{path.read_text()}"
        for rank in range(len(processes))
        if (path := folder / f"error{rank}").exists()
    ]
    for rank, process in enumerate(processes):
        if rank not in running and process.exitcode and not (folder / f"error{rank}").exists():
            errors.append(f"rank {rank} died with exit code {process.exitcode}")
    if errors:
        raise RankFailed("\n".join(errors))
    if running:
        raise RankFailed(f"ranks {running} did not finish within {deadline_s} s")
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(len(processes))]


PRELOADED = ["torch", "torch._dynamo", "dcompile", "dcompile.pipeline"]
"""Imported once, by the process that ranks are forked from: a rank is there in a tenth of a second instead of three."""


def _rank_main(
    fn: Callable[..., Any],
    args: Any,
    rank: int,
    world: int,
    backend: str,
    port: int,
    folder: str,
    deadline_s: float,
    environment: dict[str, str],
    together: bool = True,
) -> None:
    """One rank's process. ``together``: it waits at its end for the others."""
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, rank=rank, world_size=world, timeout=timedelta(seconds=max(deadline_s - 5.0, 1.0))
        )
        result = fn(rank, *args)
        torch.save(result, Path(folder) / f"result{rank}")
        if not together:
            os._exit(0)
        dist.barrier()
        if never_ended():  # its group cannot be taken down
            os._exit(0)
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
