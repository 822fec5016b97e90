"""Ranks that stay: started once for many cases, and started anew after a case that broke."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.multi_gpu.ranks import PRELOADED, RankFailed, free_port

GRACE_S = 2.0
"""After one rank has failed, how long the others may take to fail as well."""


class Crew:
    """``world`` ranks in one process group. Not for cases that leave collectives unfinished: those use ``drill``."""

    def __init__(self, world: int, backend: str = "gloo") -> None:
        self.world, self.backend = world, backend
        self.starts = 0
        self._members: list[tuple[Any, Any]] = []

    def run(self, fn: Callable[..., Any], *args: Any, deadline_s: float = 120.0) -> list[Any]:
        """Call ``fn(rank, *args)`` on every rank; what each returned, in rank order.

        Raises:
            RankFailed: a rank raised, died or did not finish; all ranks are started again for the next case.
        """
        if not self._members:
            self._start()
        for connection, _ in self._members:
            connection.send_bytes(pickle.dumps((fn, args)))
        answers = self._answers(deadline_s)
        if any(answer is None or not answer[0] for answer in answers):
            self.close()
            raise RankFailed("\n".join(_failure(rank, answer, deadline_s) for rank, answer in enumerate(answers)))
        return [answer[1] for answer in answers if answer is not None]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.starts += 1
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            args = (theirs, rank, self.world, self.backend, port, dict(os.environ))
            process = context.Process(target=_member, args=args, daemon=True)
            process.start()
            theirs.close()
            self._members.append((mine, process))

    def _answers(self, deadline_s: float) -> list[tuple[bool, Any] | None]:
        """One answer a rank: whether it went well, and the result or traceback; None without one."""
        until = time.monotonic() + deadline_s
        answers: list[tuple[bool, Any] | None] = [None] * self.world
        waiting = set(range(self.world))
        while waiting and time.monotonic() < until:
            for rank in sorted(waiting):
                connection, _ = self._members[rank]
                try:
                    if connection.poll(0.01):
                        answers[rank] = pickle.loads(connection.recv_bytes())
                    else:
                        continue
                except (EOFError, OSError):
                    answers[rank] = (False, "it died")
                waiting.discard(rank)
                if not answers[rank][0]:  # type: ignore[index]
                    until = min(until, time.monotonic() + GRACE_S)
        return answers

    def close(self) -> None:
        """End the ranks."""
        for connection, process in self._members:
            connection.close()
            process.kill()
            process.join()
        self._members = []


def _failure(rank: int, answer: tuple[bool, Any] | None, deadline_s: float) -> str:
    if answer is None:
        return f"rank {rank} did not finish; the deadline is {deadline_s:g} s, less after another rank failed"
    return f"rank {rank} " + ("finished" if answer[0] else f"failed:\n{answer[1]}")


def _member(connection: Any, rank: int, world: int, backend: str, port: int, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    while True:
        try:
            fn, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = (True, fn(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
