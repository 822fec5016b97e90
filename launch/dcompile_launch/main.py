"""The command line of ``dcompile-launch``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dcompile_launch.elastic import Job, launch, local_devices
from dcompile_launch.inplace import LaunchError, find_task

DESCRIPTION = """\
Start a training script on several ranks. Alone, it starts the ranks of this machine itself; under mpirun or srun each
task is already a rank, and the script runs in place. Either way the script finds RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in its environment, and a failing rank's exit code becomes that of this command.
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser; everything behind the script's path belongs to the script."""
    arguments = argparse.ArgumentParser("dcompile-launch", description=DESCRIPTION)
    arguments.add_argument("--nproc", metavar="N|auto", help="ranks on this machine; auto (default): GPUs, or 2 on CPU")
    arguments.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines; run the same command on each")
    arguments.add_argument("--rendezvous", metavar="HOST:PORT", help="where machines meet; needed if --nnodes > 1")
    arguments.add_argument("--job-id", metavar="NAME", help="equal on all machines of a job; needed if --nnodes > 1")
    arguments.add_argument("--log-dir", type=Path, metavar="DIR", help="keep each rank's stdout and stderr in a folder")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    arguments.add_argument("script", help="Python file to run on every rank")
    arguments.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: that of the rank that failed first, 0 if none failed."""
    arguments = parser()
    given = arguments.parse_args(argv)
    if not Path(given.script).is_file():
        arguments.error(f"no such script: {given.script}")
    try:
        task = find_task(os.environ)
        if task is not None:
            if given.nproc is not None or given.nnodes != 1:
                arguments.error(f"--nproc and --nnodes have no meaning under {task.launcher}: its tasks are the ranks")
            if given.dry_run:
                print(task.describe(given.script, given.args))
                return 0
            task.run(given.script, given.args)
            return 0
        job = Job(
            script=given.script,
            args=tuple(given.args),
            nproc=_ranks_here(given.nproc),
            nnodes=given.nnodes,
            rendezvous=given.rendezvous,
            job_id=given.job_id,
            log_dir=given.log_dir,
        )
    except LaunchError as error:
        arguments.error(str(error))
    if given.dry_run:
        print(job.describe())
        return 0
    return launch(job)


def _ranks_here(text: str | None) -> int:
    if text is None or text == "auto":
        return local_devices()
    if not text.isdecimal() or int(text) == 0:
        raise LaunchError(f"--nproc {text}: expected a positive number or auto")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
