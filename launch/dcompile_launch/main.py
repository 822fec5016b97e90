"""The command line of ``dcompile-launch``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dcompile_launch.elastic import CPU_RANKS, Job, launch, local_gpus
from dcompile_launch.inplace import LaunchError, find_task
from dcompile_launch.rank import PINS
from dcompile_launch.templates import TEMPLATES, template

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
    arguments.add_argument("--log-dir", type=Path, metavar="DIR", help="keep each rank's output, and all of it merged")
    arguments.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="start again N times after a failure"
    )
    arguments.add_argument(
        "--pin", choices=PINS, default="auto", help="tie ranks to NUMA nodes (auto) or shares of cores"
    )
    arguments.add_argument(
        "--template", action=_PrintTemplate, choices=TEMPLATES, help="print a job file to start from"
    )
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
        gpus = local_gpus()
        job = Job(
            script=given.script,
            args=tuple(given.args),
            nproc=_ranks_here(given.nproc, gpus),
            nnodes=given.nnodes,
            rendezvous=given.rendezvous,
            job_id=given.job_id,
            log_dir=given.log_dir,
            max_restarts=given.max_restarts,
            pin=given.pin,
            gpus=gpus,
        )
    except LaunchError as error:
        arguments.error(str(error))
    if given.dry_run:
        print(job.describe())
        return 0
    return launch(job)


class _PrintTemplate(argparse.Action):
    """Prints a job template and ends, whatever else is missing on the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        print(template(str(values)), end="")
        parser.exit()


def _ranks_here(text: str | None, gpus: int) -> int:
    if text is None or text == "auto":
        return gpus or CPU_RANKS
    if not text.isdecimal() or int(text) == 0:
        raise LaunchError(f"--nproc {text}: expected a positive number or auto")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
