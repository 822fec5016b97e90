"""Bad days: ranks that die, stop or lose their store, and disks that are full. Each drill ends, by name, in time.

Deadlines inside are short and those of the tests generous: a busy machine may make everything late.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import drill, run_ranks

pytestmark = pytest.mark.multi_rank

WAIT_S = 6.0
"""Deadline of every wait in a drill."""


def reduced(x: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x @ x.t(), "sum", group))  # type: ignore[no-any-return]


def compiled(cache: str | None, **options: Any) -> Any:
    import dcompile

    return dcompile.compile(reduced, cache_dir=cache, **{"deadline_s": WAIT_S, **options})


def world_name() -> str:
    assert dist.group.WORLD is not None
    return str(dist.group.WORLD.group_name)


def killed_while_compiling(rank: int, cache: str) -> None:
    from dcompile.pipeline import program
    from dcompile.runtime import once

    once.SILENCE_S = 2.0

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        program.write_entry = die  # type: ignore[assignment]
    compiled(cache if rank == 0 else f"{cache}/1")(torch.eye(3), world_name())


def test_a_rank_killed_while_it_compiles() -> None:
    with tempfile.TemporaryDirectory() as cache:
        (first, second) = drill(killed_while_compiling, cache)
    if second.exit_code == -signal.SIGKILL:  # it was the one to compile, or compiled for its own folder
        assert "DeadlineExceeded" in first.error
        assert "rank 1 did not come with a program" in first.error
        assert "rank 1 is compiling inference" in first.error
    else:
        assert (first.error, second.error) == ("", ""), "it got the program from the other rank and never compiled"


def killed_in_a_collective(rank: int, how: str, flights: str) -> None:
    run = compiled(None, flight_dir=flights)
    run(torch.eye(3), world_name())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    run(torch.eye(3), world_name())


def test_a_rank_killed_in_a_collective(tmp_path: Path) -> None:
    first, second = drill(killed_in_a_collective, "kill", str(tmp_path))
    assert second.exit_code == -signal.SIGKILL
    assert "failed, probably because another rank ended" in first.error
    assert "all_reduce.sum at test_faults.py" in first.error
    assert "number 2 there" in first.error


def test_a_rank_that_is_stopped_is_missed_by_name(tmp_path: Path) -> None:
    first, second = drill(killed_in_a_collective, "stop", str(tmp_path), still=1)
    assert second.exit_code is None, "it would have stood still for ever"
    assert f"did not end within {WAIT_S:g} s" in first.error
    assert "rank 1 says nothing" in first.error
    assert f"flight recorder: {tmp_path}/dcompile_rank_0" in first.error
    assert (tmp_path / "dcompile_rank_0").exists()


def store_host_gone(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.set("rank 1 has joined", "")
    if rank == 0:
        store.wait(["rank 1 has joined"])
        os.kill(os.getpid(), signal.SIGKILL)
    compiled(None)(torch.eye(3), world_name())


def test_the_host_of_the_store_is_gone() -> None:
    first, second = drill(store_host_gone)
    assert first.exit_code == -signal.SIGKILL
    assert "PeerGone" in second.error
    assert "the store does not answer while ranks agree" in second.error


def leaves_early(rank: int) -> None:
    run = compiled(None, deadline_s=60.0)
    run(torch.eye(3), world_name())
    if rank == 1:
        from dcompile.runtime.board import leave

        leave()  # as at the end of a process whose data ran out
        signal.pause()
    run(torch.eye(3), world_name())


def test_a_rank_that_ends_early_is_named_at_once() -> None:
    first, _ = drill(leaves_early, still=1)
    assert "PeerGone" in first.error
    assert "rank 1 has left: its program ended" in first.error
    assert first.seconds < 50


def uncaught(rank: int) -> None:
    """The exit code that an error has that nobody catches; not of this harness, which catches all."""
    import sys

    run = compiled(None)
    run(torch.eye(3), world_name())
    if rank == 1:
        signal.pause()
    try:
        run(torch.eye(3), world_name())
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]


def test_an_uncaught_deadline_has_an_exit_code_of_its_own() -> None:
    from dcompile.runtime.last_words import DEADLINE_EXIT

    first, _ = drill(uncaught, still=1)
    assert first.exit_code == DEADLINE_EXIT


def caches_that_fail(rank: int, folder: str) -> list[str]:
    """On every rank: a full disk, then truncated entries, then entries of another user."""
    import dcompile
    from dcompile.runtime import cache as cache_module

    said: list[str] = []

    def step(name: str) -> None:
        torch.compiler.reset()
        dcompile.reset_counters()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = compiled(f"{folder}/{name}", deadline_s=60.0)(torch.eye(3), world_name())
        assert torch.equal(result, 2 * torch.eye(3))
        said.append(" ".join(str(w.message) for w in caught if "dcompile" in str(w.message)))

    seal, uid = cache_module._seal, os.getuid

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache_module._seal = full
    step("full")
    cache_module._seal = seal
    step("good")
    dist.barrier()
    if rank == 0:
        for path in Path(folder, "good").glob("??/*/host.py"):
            path.write_text(path.read_text()[:100])
    dist.barrier()
    step("good")
    dist.barrier()
    os.getuid = lambda: uid() + 1
    try:
        step("good")
    finally:
        os.getuid = uid
    return said


def test_caches_that_are_full_truncated_or_of_another_user_do_not_stop_anybody() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(caches_that_fail, folder, deadline_s=120)
    together = [" ".join(said[step] for said in ranks) for step in range(4)]
    assert "No space left on device" in together[0]
    assert "private temporary folder" in together[0]
    assert together[1] == " "
    assert "is corrupt" in together[2]
    assert "belongs to user" in together[3]


def hangs_on_the_gpu(rank: int, flights: str) -> None:
    run = compiled(None, flight_dir=flights)
    x = torch.eye(64, device="cuda")
    run(x, world_name())
    torch.cuda.synchronize()
    if rank == 1:
        signal.pause()
    run(x, world_name())  # returns: a wait only orders the stream
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_collective_that_hangs_on_the_gpu_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dcompile.runtime.last_words import DEADLINE_EXIT

    first, _ = drill(hangs_on_the_gpu, str(tmp_path), still=1, backend="nccl")
    assert first.exit_code == DEADLINE_EXIT
    said = capfd.readouterr().err
    assert "all_reduce.sum at test_faults.py" in said
    assert "number 2 there, did not end within 6 s" in said
    assert "rank 1 says nothing" in said
    assert (tmp_path / "dcompile_rank_0").exists()
