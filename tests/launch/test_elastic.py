"""Ranks as child processes: results, exit codes, the traceback that is shown last, logs and the dry run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dcompile_launch.elastic import Job, last_traceback
from dcompile_launch.inplace import LaunchError

ROOT = Path(__file__).parents[2]

SCRIPT = """\
import os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
total = torch.tensor([3.5 * rank + 1.25])
dist.all_reduce(total)
threads = os.environ["OMP_NUM_THREADS"]
sys.stdout.write(f"rank {rank} of {dist.get_world_size()} total {total.item()} threads {threads} {sys.argv[1:]}\\n")
sys.stdout.flush()
how = sys.argv[1] if len(sys.argv) > 1 else ""
if rank == 1:
    if how == "raise":
        try:
            {}["weights"]
        except KeyError as error:
            raise ValueError("the weights of rank 1 are wrong") from error
    if how == "exit":
        sys.exit(37)
    if how == "kill":
        os.kill(os.getpid(), 9)
dist.all_reduce(total)
dist.destroy_process_group()
"""


def run(
    *arguments: str, launcher: tuple[str, ...] = (), unset: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """``dcompile-launch`` with these arguments, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment.update(variables, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'launch'}")
    command = [*launcher, sys.executable, "-m", "dcompile_launch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.multi_rank
def test_two_ranks_talk_and_share_the_cores(script: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    result = run("--nproc", "2", "--log-dir", str(logs), script, "--flag", "a b", unset=("OMP_NUM_THREADS",))
    assert result.returncode == 0, result.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        line = f"rank {rank} of 2 total 6.0 threads {threads} ['--flag', 'a b']"
        assert line in result.stdout
        (kept,) = logs.rglob(f"{rank}/stdout.log")
        assert kept.read_text().splitlines() == [line]


@pytest.mark.multi_rank
@pytest.mark.parametrize(("how", "exit_code"), [("raise", 1), ("exit", 37), ("kill", 128 + 9)])
def test_the_first_failing_rank_decides(script: str, how: str, exit_code: int) -> None:
    result = run("--nproc", "2", script, how)
    assert result.returncode == exit_code, result.stderr
    last = result.stderr[result.stderr.index("\nrank ") :].strip().splitlines()
    assert last[0] == f"rank 1 failed first ({'signal 9' if how == 'kill' else f'exit code {exit_code}'}):"
    if how == "raise":
        assert last[1].startswith("Traceback")
        assert "KeyError: 'weights'" in last
        assert last[-1] == "ValueError: the weights of rank 1 are wrong"
    assert "Connection closed" not in "\n".join(last)


def test_dry_run_says_what_would_start(script: str) -> None:
    result = run("--nproc", "3", "--pin", "none", "--dry-run", script, "--steps", "5", OMP_NUM_THREADS="4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "start    3 ranks on this machine, 3 in all",
        f"command  {sys.executable} -u {script} --steps 5",
        "threads  OMP_NUM_THREADS=4 each",
        "place    any core; no GPU of their own",
        "meet     on this machine, at a free port",
        "logs     not kept",
        "restarts 0",
    ]


def test_dry_run_of_several_machines(script: str) -> None:
    meeting = ("--nnodes", "4", "--rendezvous", "node0:3000", "--job-id", "run7")
    result = run("--nproc", "2", *meeting, "--dry-run", script)
    assert "start    2 ranks on this machine, 8 in all" in result.stdout
    assert "meet     at node0:3000, job run7" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nproc", "none", "SCRIPT"), "--nproc none: expected a positive number or auto"),
        (("--nproc", "0", "SCRIPT"), "--nproc 0: expected a positive number or auto"),
        (("--nproc", "2", "--nnodes", "2", "SCRIPT"), "--nnodes 2 needs --rendezvous"),
        (("--nproc", "2", "absent.py"), "no such script: absent.py"),
    ],
)
def test_a_wrong_command_line_is_explained(script: str, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(script if argument == "SCRIPT" else argument for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr


def test_threads_are_never_less_than_one() -> None:
    assert Job("s.py", nproc=10_000).threads({}) == "1"
    assert Job("s.py", nproc=1).threads({"OMP_NUM_THREADS": "7"}) == "7"
    with pytest.raises(LaunchError, match="--nnodes 0"):
        Job("s.py", nnodes=0)


def test_last_traceback_keeps_the_chain_and_drops_what_came_before() -> None:
    first = "Traceback (most recent call last):\n  File 'a'\nKeyError: 1\n"
    chain = "\nThe above exception was the direct cause of the following exception:\n\n"
    second = "Traceback (most recent call last):\n  File 'b'\nValueError: 2"
    assert last_traceback(f"noise\n{first}more\n{second}\n") == second
    assert last_traceback(f"noise\n{first}{chain}{second}") == first + chain + second
    prefixed = re.sub("^", "[rank3]: ", first + chain + second, flags=re.MULTILINE)
    assert last_traceback(prefixed) == first + chain + second
    assert last_traceback("\n".join(str(n) for n in range(100))) == "\n".join(str(n) for n in range(80, 100))
