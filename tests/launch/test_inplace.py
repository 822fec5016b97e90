"""Ranks that mpirun or srun started: what is read from their variables, and real runs under an MPI launcher."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dcompile_launch.inplace import LaunchError, Task, find_task, first_host
from tests.launch.test_elastic import run, script  # noqa: F401 (a fixture)

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-17@1",
}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "991",
    "SLURM_STEP_ID": "0",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_no_launcher_no_task() -> None:
    assert find_task({"RANK": "0", "WORLD_SIZE": "2"}) is None


def test_a_slurm_batch_script_is_not_a_task() -> None:
    assert find_task({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) is None


def test_open_mpi() -> None:
    assert find_task(OPEN_MPI) == Task("Open MPI", 5, 8, 1, 4, None, "prterun-17@1")


def test_slurm_knows_the_machine_of_rank_0() -> None:
    task = find_task(SLURM)
    assert task == Task("Slurm", 6, 7, 2, 3, "gpu007", "991.0")
    found = task.environment({})
    assert found["MASTER_ADDR"] == "gpu007"
    assert found == {**found, "RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}


def test_hydra_on_one_machine() -> None:
    task = find_task(HYDRA)
    assert task == Task("MPI (Hydra)", 1, 2, 1, 2)
    assert task.environment({})["MASTER_ADDR"] == "127.0.0.1"


def test_hydra_without_local_rank_is_refused() -> None:
    with pytest.raises(LaunchError, match="MPI_LOCALRANKID"):
        find_task({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_ports_are_equal_in_a_job_and_differ_between_jobs() -> None:
    ports = {job: Task("Slurm", 0, 2, 0, 2, "n0", job).environment({})["MASTER_PORT"] for job in ("1.0", "1.1", "2.0")}
    assert len(set(ports.values())) == 3
    assert all(20_000 <= int(port) < 32_000 for port in ports.values())
    assert Task("Slurm", 1, 2, 1, 2, "n0", "1.1").environment({})["MASTER_PORT"] == ports["1.1"]


def test_what_the_user_sets_wins() -> None:
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "4711", "OMP_NUM_THREADS": "3"}
    task = find_task(SLURM)
    assert task is not None
    found = task.environment(given)
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu007", "gpu007"), ("a,b", "a"), ("gpu[003-007,9],login", "gpu003"), ("r1n[2,5]-ib,x", "r1n2-ib")],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_tasks_per_machine_with_repetition() -> None:
    counts = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}
    sizes = [find_task({**SLURM, **counts, "SLURM_NODEID": str(node)}).local_size for node in range(3)]  # type: ignore[union-attr]
    assert sizes == [4, 4, 3]


def test_dry_run_under_a_launcher(script: str) -> None:  # noqa: F811
    result = run("--dry-run", script, "--steps", "3", **SLURM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Slurm task, runs in place\ncommand  {sys.executable} {script} --steps 3\n")
    assert re.search(r"RANK=6 WORLD_SIZE=7 LOCAL_RANK=2 .*MASTER_ADDR=gpu007", result.stdout)


def test_ranks_of_its_own_are_refused_under_a_launcher(script: str) -> None:  # noqa: F811
    result = run("--nproc", "2", script, **HYDRA)
    assert result.returncode == 2
    assert "have no meaning under MPI (Hydra)" in result.stderr


@pytest.mark.multi_rank
@pytest.mark.parametrize("known", [True, False], ids=["launcher knows the machine", "asked over MPI"])
def test_two_ranks_under_mpiexec(script: str, known: bool) -> None:  # noqa: F811
    mpiexec = Path(sys.executable).with_name("mpiexec")
    hide = () if known else ("env", "-u", "MPI_LOCALNRANKS")
    result = run(script, "--flag", launcher=(str(mpiexec), "-n", "2", *hide), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 total 6.0 threads 1 ['--flag']" in result.stdout


@pytest.mark.multi_rank
def test_a_failing_rank_under_mpiexec_fails_the_job(script: str) -> None:  # noqa: F811
    mpiexec = Path(sys.executable).with_name("mpiexec")
    result = run(script, "raise", launcher=(str(mpiexec), "-n", "2"))
    assert result.returncode != 0
    assert "ValueError: the weights of rank 1 are wrong" in result.stderr
