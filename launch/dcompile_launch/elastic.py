"""Ranks of this machine as child processes, on torch's elastic agent (the machinery of ``torchrun``)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcompile_launch import compiling
from dcompile_launch.inplace import LaunchError
from dcompile_launch.merged import merged
from dcompile_launch.rank import memory_nodes, share

CPU_RANKS = 2
"""Ranks that ``--nproc auto`` starts on a machine without GPUs: the fewest that communicate."""

CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
"""How Python introduces the next of several chained tracebacks."""

MEANINGS = {
    90: "a collective or another rank did not come in time",
    91: "ranks launched or compiled different things",
    92: "another rank ended while it was needed",
    93: "a collective failed",
}
"""Exit codes that compiled programs end with (``dcompile.runtime.last_words``)."""

TAIL_LINES = 20
"""Lines of standard error shown for a rank that ended without a traceback: one screen."""


def local_gpus() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        script: Python file, run by every rank.
        args: its arguments.
        nproc: ranks on this machine.
        nnodes: machines.
        rendezvous: ``host:port`` where machines meet; None on one machine, where a free port is taken.
        job_id: name shared by all machines of the job.
        log_dir: folder that keeps every rank's output, in files of its own and merged, and what its flight recorder
            held when a collective did not end; None keeps output only while the job runs.
        max_restarts: how often the ranks of all machines are started again after one of them has failed.
        pin: how ranks are tied to cores, see ``rank.share``.
        gpus: devices of this machine; each rank's is made its current one.

    Raises:
        LaunchError: several machines, but no rendezvous or no job id.
    """

    script: str
    args: tuple[str, ...] = ()
    nproc: int = CPU_RANKS
    nnodes: int = 1
    rendezvous: str | None = None
    job_id: str | None = None
    log_dir: Path | None = None
    max_restarts: int = 0
    pin: str = "auto"
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise LaunchError(f"--nnodes {self.nnodes}: expected a positive number")
        if self.max_restarts < 0:
            raise LaunchError(f"--max-restarts {self.max_restarts}: expected 0 or more")
        if self.nnodes > 1 and not (self.rendezvous and self.job_id):
            raise LaunchError(f"--nnodes {self.nnodes} needs --rendezvous HOST:PORT and --job-id NAME on every machine")

    def threads(self, environment: Mapping[str, str]) -> str:
        """``OMP_NUM_THREADS`` of each rank: the value already set, else this process's cores shared evenly."""
        return environment.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // self.nproc))

    @property
    def command(self) -> tuple[str, ...]:
        """What each rank runs. A rank that is to be placed goes through ``dcompile_launch.rank``."""
        several_nodes = len(memory_nodes(sorted(os.sched_getaffinity(0)))) > 1
        placed = self.gpus > 0 or self.pin == "cores" or (self.pin == "auto" and several_nodes)
        way = ("-m", "dcompile_launch.rank", self.pin) if placed else ()
        return (sys.executable, "-u", *way, self.script, *self.args)

    def describe(self) -> str:
        """The job in words, for ``--dry-run``."""
        meeting = f"at {self.rendezvous}, job {self.job_id}" if self.rendezvous else "on this machine, at a free port"
        return "\n".join(
            (
                f"start    {self.nproc} ranks on this machine, {self.nproc * self.nnodes} in all",
                f"command  {shlex.join(self.command)}",
                f"threads  OMP_NUM_THREADS={self.threads(os.environ)} each",
                f"place    {self._places()}",
                f"meet     {meeting}",
                f"logs     {self.log_dir or 'not kept'}",
                f"restarts {self.max_restarts}",
            )
        )

    def _places(self) -> str:
        nodes = memory_nodes(sorted(os.sched_getaffinity(0)))
        shares = [share(self.pin, rank, self.nproc, nodes) for rank in range(self.nproc)]
        cores = [f"{cores[0]}-{cores[-1]}" for cores in shares if cores]
        pinned = f"cores {', '.join(cores)}" if cores else "any core"
        if self.gpus >= self.nproc:
            return f"{pinned}; GPUs 0 to {self.nproc - 1}"
        return f"{pinned}; no GPU of their own"


def launch(job: Job) -> int:
    """Starts the ranks and waits for them.

    Returns:
        0, or the exit code of the rank that failed first (128 + n if signal n ended it). The end of that rank's
        standard error, its traceback, is then the last thing printed. The other ranks are stopped.
    """
    if job.log_dir is not None:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        return _launch(job, job.log_dir)
    with tempfile.TemporaryDirectory(prefix="dcompile-launch-") as folder:
        return _launch(job, Path(folder))


def _launch(job: Job, log_dir: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = job.threads(os.environ)
    progress = Path(os.environ.setdefault(compiling.VARIABLE, str(log_dir / "compiling")))
    progress.mkdir(parents=True, exist_ok=True)
    if job.max_restarts:  # else ranks that are started again meet in a store full of addresses of the dead
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if job.log_dir is not None:
        os.environ.setdefault("DCOMPILE_FLIGHT_DIR", str(log_dir / "flights"))
    run_id = job.job_id or uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=job.nproc,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=job.rendezvous or "localhost:0",
        max_restarts=job.max_restarts,
        local_addr=None if job.rendezvous else "localhost",
        # Standard output stays the terminal's, so that progress bars work, unless it is to be kept as well.
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir), tee=Std.ERR if job.log_dir is None else Std.ALL),
        log_line_prefix_template="[rank ${rank}] ",
    )
    try:
        with merged(log_dir, run_id), compiling.shown(progress):
            elastic_launch(config, job.command[0])(*job.command[1:])
    except ChildFailedError as error:
        # Ranks that end by SIGTERM were stopped by the agent because of the others.
        failures = list(error.failures.items())
        own = [(rank, failure) for rank, failure in failures if failure.exitcode != -signal.SIGTERM] or failures
        logs = {rank: _stderr_log(log_dir, run_id, failure.local_rank) for rank, failure in own}
        rank, failure = min(own, key=lambda item: _last_write_ns(logs[item[0]]))
        _show_failure(rank, failure.exitcode, logs[rank])
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _stderr_log(log_dir: Path, run_id: str, local_rank: int) -> Path | None:
    """Where the agent keeps a rank's standard error: ``<log_dir>/<run id>_<random>/attempt_<n>/<local rank>``, of the
    last attempt."""
    found = log_dir.glob(f"{run_id}_*/attempt_*/{local_rank}/stderr.log")
    return max(found, key=lambda path: int(path.parent.parent.name.removeprefix("attempt_")), default=None)


def _last_write_ns(log: Path | None) -> int:
    """When a rank last wrote to standard error, in nanoseconds.

    The agent notices failures by polling, so a rank that failed only because another one left looks as early to it as
    the cause. The one that wrote its last words first is the cause; one that left without a word wrote none after its
    start, while its peers complain about a closed connection.
    """
    return log.stat().st_mtime_ns if log is not None else sys.maxsize


def _show_failure(rank: int, exit_code: int, log: Path | None) -> None:
    cause = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    if exit_code in MEANINGS:
        cause += f", {MEANINGS[exit_code]}"
    last_words = last_traceback(log.read_text(errors="replace")) if log is not None else ""
    print(f"\nrank {rank} failed first ({cause}):\n{last_words}", file=sys.stderr, flush=True)


def last_traceback(text: str) -> str:
    """The last traceback in ``text`` with those it is chained to; without any, the last ``TAIL_LINES`` lines."""
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in text.rstrip().splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last):")]
    if not starts:
        return "\n".join(lines[-TAIL_LINES:])
    start = starts.pop()
    while starts and any(line.startswith(CHAINED) for line in lines[starts[-1] : start]):
        start = starts.pop()
    return "\n".join(lines[start:])
