"""What becomes of collectives that fail, on a process group of one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcompile.errors import CompilerBug, DCompileError, DeadlineExceeded
from dcompile.runtime import comm as comm_module
from dcompile.runtime.comm import Handle, TorchComm
from dcompile.runtime.program import Executable

DEADLINE_S = 0.4


class Stuck:
    """A work that never ends."""

    def wait(self, timeout: timedelta) -> None:
        time.sleep(timeout.total_seconds())
        raise RuntimeError("Operation timed out!")


class Slow:
    """A work that ends after some time."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def wait(self, timeout: timedelta) -> None:
        left = self.ends - time.monotonic()
        time.sleep(max(min(left, timeout.total_seconds()), 0))
        if left > timeout.total_seconds():
            raise RuntimeError("Operation timed out!")


class Broken:
    """A work whose peer is gone."""

    def wait(self, timeout: timedelta) -> None:
        raise RuntimeError("Connection closed by peer")


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchComm]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(comm_module, "_quarantine", [])
    yield TorchComm({"g0": dist.group.WORLD}, DEADLINE_S)
    dist.destroy_process_group()


def flight(name: str, *works: Any) -> Handle:
    handle = Handle(name, "g0")
    handle.works.extend(works)
    return handle


def quarantined() -> list[str]:
    return [handle.name for handle in comm_module._quarantine]


def seconds(body: Callable[[], object]) -> float:
    started = time.monotonic()
    body()
    return time.monotonic() - started


def test_a_failed_wait_costs_one_deadline(comm: TorchComm) -> None:
    stuck, other, ended = flight("stuck", Stuck()), flight("other", Stuck()), flight("ended", Slow(0.0))
    finished: list[str] = []
    ended.finish.append(lambda: finished.append("ended"))

    def fail() -> None:
        with pytest.raises(DeadlineExceeded, match="stuck"):
            comm.wait(stuck)
        assert quarantined() == ["stuck"]
        assert not comm.drain((None, stuck, other, ended))

    assert DEADLINE_S * 0.9 < seconds(fail) < DEADLINE_S * 1.6
    assert quarantined() == ["stuck", "other"]
    assert finished == ["ended"]


def test_others_are_drained_with_what_is_left_of_the_first_deadline(comm: TorchComm) -> None:
    broken, slow, stuck = flight("broken", Broken()), flight("slow", Slow(DEADLINE_S / 3)), flight("stuck", Stuck())

    def fail() -> None:
        with pytest.raises(DCompileError, match="another rank ended"):
            comm.wait(broken)
        time.sleep(DEADLINE_S / 4)
        assert not comm.drain((broken, slow, stuck))

    assert DEADLINE_S * 0.9 < seconds(fail) < DEADLINE_S * 1.2
    assert quarantined() == ["broken", "stuck"]


def test_an_error_of_the_program_waits_for_what_is_in_flight(comm: TorchComm) -> None:
    assert comm.drain((flight("slow", Slow(DEADLINE_S / 2)), None))
    assert seconds(lambda: comm.drain((flight("stuck", Stuck()),), patient=False)) < DEADLINE_S / 2
    assert quarantined() == ["stuck"]


def start(comm: TorchComm, reduction: str, *tensors: torch.Tensor) -> Handle:
    return comm.start("all_reduce", tensors, tensors, "g0", reduction, None, True, "p = all_reduce at m.py:3")


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("avg", torch.bool), ("max", torch.complex64), ("bor", torch.float32)]
)
def test_all_parts_are_checked_before_any_is_launched(
    comm: TorchComm, monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("launched"))
    good = torch.randn(3) if reduction != "bor" else torch.randint(9, (3,))
    with pytest.raises(DCompileError, match=rf"m\.py:3.*{reduction} over ranks is not defined for {dtype}"):
        start(comm, reduction, good, torch.ones(3, dtype=dtype))
    assert comm.drain((None,))
    assert quarantined() == []


def refuse_second(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From now on the second all-reduce raises; the first one never ends."""
    launched: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, **_: Any) -> Stuck:
        launched.append(tensor)
        if len(launched) == 2:
            raise error
        return Stuck()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)


@pytest.mark.parametrize("error", [RuntimeError("no such op"), TypeError("no such dtype"), KeyboardInterrupt()])
def test_what_a_failed_start_has_launched_is_not_lost(
    comm: TorchComm, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    refuse_second(monkeypatch, error)
    first, second = torch.randn(3), torch.randint(9, (3,))
    with pytest.raises(DCompileError if isinstance(error, Exception) else KeyboardInterrupt):
        start(comm, "sum", first, second)
    (lost,) = comm_module._quarantine
    assert any(kept.data_ptr() == first.data_ptr() for part in lost.keep for kept in part)
    assert not comm.drain((None,))
    assert comm.drain((None,))


SOURCE = """
arena = rt.arena({"cpu": 64}, lambda block: ())
taken = []

def call(inputs):
    x, y = inputs
    inputs.clear()
    p = None
    block = arena.take()
    taken.append(block)
    try:
        p = rt.comm.start("all_reduce", (x, y), (x, y), "g0", "sum", None, True, "p")
        rt.comm.wait(p)
        result = [x]
    except BaseException:
        rt.abandon(arena, block, (p,))
        raise
    arena.give(block)
    return result
"""


def test_the_memory_of_a_failed_start_is_not_used_again(comm: TorchComm, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Executable(SOURCE, "f", {}, comm)
    taken = run.run.__globals__["taken"]
    refuse_second(monkeypatch, RuntimeError("no such op"))
    inputs = [torch.randn(3), torch.randint(9, (3,))]
    with pytest.raises(DCompileError, match="cannot start: no such op"):
        run(inputs.copy())
    monkeypatch.undo()
    run(inputs.copy())
    run(inputs.copy())
    assert taken[0] is not taken[1]
    assert taken[1] is taken[2]


def test_unknown_kinds_are_compiler_bugs(comm: TorchComm) -> None:
    with pytest.raises(CompilerBug, match="no collective is called 'gather'"):
        comm.start("gather", (), (), "g0", None, None, False, "p")


def test_a_work_without_a_future_counts_as_over_when_it_is_waited_for(comm: TorchComm) -> None:
    class Futureless(Slow):
        def get_future(self) -> None:
            raise RuntimeError("Work::getFuture not implemented.")

    told: list[str] = []
    handle = flight("scatter", Futureless(0.0))
    handle.when_done(lambda: told.append("over"))
    assert told == []
    comm.wait(handle)
    assert told == ["over"]


def test_a_rank_that_averages_alone_counts_for_all() -> None:
    """As if every rank had sent the same: whatever form the sum over ranks has, its share times their number."""
    share = torch.randn(3, 2)
    summed, gathered = torch.empty(3, 2), torch.empty(6, 2)
    comm_module._keep_own("all_reduce", (share,), (summed,), 2)
    comm_module._keep_own("all_gather", (share,), (gathered,), 2)
    assert torch.equal(summed, share * 2)
    assert torch.equal(gathered, torch.cat([share, share]))
    with pytest.raises(CompilerBug, match="broadcast"):
        comm_module._keep_own("broadcast", (share,), (summed,), 2)


def test_a_lowering_on_few_multiprocessors_uses_a_group_of_its_own(
    comm: TorchComm, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dist.new_group([0])
    asked: list[object] = []
    monkeypatch.setattr(comm_module, "few_ctas", lambda group: asked.append(group) or own)
    used: list[object] = []
    monkeypatch.setattr(dist, "all_reduce", lambda *_, group, **__: used.append(group) or Slow(0.0))
    tensor = torch.randn(4)
    call = ("all_reduce", (tensor,), (tensor,), "g0", "sum", None, True, "p")
    comm.wait(comm.start(*call))
    comm.wait(comm.start(*call, via="few_ctas"))
    assert asked == [dist.group.WORLD]
    assert used == [dist.group.WORLD, own]
