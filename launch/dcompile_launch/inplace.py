"""A rank started by mpirun or srun: the launcher's own variables become the ones torch.distributed reads."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_PORT, PORTS = 20_000, 12_000
"""Ports derived from a job's name: above the registered services, below 32768 where Linux starts to hand out ports
to outgoing connections."""

DEFAULT_PORT = 29_500
"""torch.distributed's own default, for a launcher that gives its job no name."""


class LaunchError(RuntimeError):
    """The command line or the launcher's environment does not describe a job; the message says what to give."""


@dataclass(frozen=True)
class Task:
    """One rank of a job that another launcher started.

    Attributes:
        launcher: ``"Open MPI"``, ``"MPI (Hydra)"`` or ``"Slurm"``.
        rank: of this task in the whole job.
        world_size: tasks in the whole job.
        local_rank: of this task on its machine.
        local_size: tasks on this machine; None if the launcher does not say.
        first_host: machine of rank 0; None if the launcher does not say.
        job: a name equal on all ranks and different between jobs; None if the launcher does not say.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int | None = None
    first_host: str | None = None
    job: str | None = None

    def environment(self, current: Mapping[str, str]) -> dict[str, str]:
        """The variables of torch.distributed. ``MASTER_ADDR`` and ``MASTER_PORT`` of ``current`` are kept.

        Raises:
            LaunchError: the ranks are on several machines and nothing says which one rank 0 is on.
        """
        address, port = self._meeting_point(current)
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        if self.local_size:
            cores = len(os.sched_getaffinity(0))
            values["OMP_NUM_THREADS"] = current.get("OMP_NUM_THREADS") or max(1, cores // self.local_size)
        return {name: str(value) for name, value in values.items() if value is not None}

    def _meeting_point(self, current: Mapping[str, str]) -> tuple[str, str | int]:
        address = current.get("MASTER_ADDR") or self.first_host
        if address is None and self.local_size == self.world_size:
            address = "127.0.0.1"
        if address is None:
            return _ask_mpi(self.launcher)
        job_port = FIRST_PORT + zlib.crc32(self.job.encode()) % PORTS if self.job else DEFAULT_PORT
        return address, current.get("MASTER_PORT") or job_port

    def describe(self, script: str, args: Sequence[str]) -> str:
        """The task in words, for ``--dry-run``."""
        values = " ".join(f"{name}={value}" for name, value in self.environment(os.environ).items())
        command = shlex.join([sys.executable, script, *args])
        return f"{self.launcher} task, runs in place\ncommand  {command}\nsets     {values}"

    def run(self, script: str, args: Sequence[str]) -> None:
        """Runs the script in this process, as ``python script args...`` would."""
        os.environ.update(self.environment(os.environ))
        sys.argv = [script, *args]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def find_task(environment: Mapping[str, str]) -> Task | None:
    """The task this process is, or None outside mpirun and srun.

    A Slurm batch script is not a task: only ``srun`` sets ``SLURM_STEP_NUM_TASKS``.
    """
    get = environment.get
    if "OMPI_COMM_WORLD_RANK" in environment:
        return Task(
            "Open MPI",
            rank=int(environment["OMPI_COMM_WORLD_RANK"]),
            world_size=int(environment["OMPI_COMM_WORLD_SIZE"]),
            local_rank=int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),
            local_size=int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]),
            job=get("PMIX_NAMESPACE") or get("OMPI_MCA_ess_base_jobid"),
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        hosts = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST")
        return Task(
            "Slurm",
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=_tasks_here(environment),
            first_host=first_host(hosts) if hosts else None,
            job=f"{get('SLURM_JOB_ID')}.{get('SLURM_STEP_ID')}",
        )
    if "PMI_RANK" in environment and "PMI_SIZE" in environment:
        if "MPI_LOCALRANKID" not in environment:
            raise LaunchError("this MPI launcher sets PMI_RANK but not MPI_LOCALRANKID; set RANK etc. yourself")
        return Task(
            "MPI (Hydra)",
            rank=int(environment["PMI_RANK"]),
            world_size=int(environment["PMI_SIZE"]),
            local_rank=int(environment["MPI_LOCALRANKID"]),
            local_size=int(environment["MPI_LOCALNRANKS"]) if "MPI_LOCALNRANKS" in environment else None,
        )
    return None


def first_host(hosts: str) -> str:
    """The first name of a Slurm host list: ``"gpu[003-007,9],login"`` gives ``"gpu003"``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    if match is None:
        raise LaunchError(f"cannot read the Slurm host list {hosts!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Tasks on this machine by ``SLURM_STEP_TASKS_PER_NODE``, for example ``"4(x2),3"``; None if absent."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def _ask_mpi(launcher: str) -> tuple[str, int]:
    """Rank 0's host name and a free port there, over MPI itself.

    MPI is finalised again at once: a rank that fails while MPI is up would wait in its finalisation for the others,
    which in turn wait for that rank. A script that uses MPI of its own therefore sets both variables.
    """
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"the ranks are on several machines and {launcher} does not say where rank 0 is: "
            "set MASTER_ADDR and MASTER_PORT, or install dcompile[mpi]"
        ) from error
    meeting: tuple[str, int] | None = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        with socket.socket() as listener:
            listener.bind(("", 0))
            meeting = (socket.gethostname(), listener.getsockname()[1])
    host, port = MPI.COMM_WORLD.bcast(meeting, root=0)
    MPI.Finalize()
    return host, port
