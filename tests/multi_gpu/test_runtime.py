"""Collectives of generated programs on real process groups."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcompile.errors import DCompileError, DeadlineExceeded, Divergence, Unsupported
from dcompile.runtime.agree import agree_on
from dcompile.runtime.comm import TorchComm, find_group
from dcompile.runtime.timeline import Recorder
from tests.adversary import collective
from tests.multi_gpu.ranks import run_ranks
from tests.unit.codegen.programs import program
from tests.unit.runtime.blocks import waiting_blocks

pytestmark = pytest.mark.multi_rank

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
WORLD = 2


def data(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2 if dtype is torch.bool else 5, shape, generator=generator).to(dtype)


def reductions_of(dtype: torch.dtype) -> tuple[str, ...]:
    if dtype.is_floating_point:
        return REDUCTIONS[:5]
    if dtype.is_complex:
        return ("sum", "avg")
    return ("sum", "product", "min", "max", "bxor") if dtype is torch.bool else ("sum", *REDUCTIONS[2:])


def expected(kind: str, sources: list[Tensor], rank: int, reduction: str | None, root: int | None) -> Tensor:
    if sources[0].dtype is torch.bool and reduction:
        wide = {"sum": "bor", "product": "band", "min": "band", "max": "bor"}.get(reduction, reduction)
        return collective(kind, sources, rank, wide, root)
    return collective(kind, sources, rank, reduction, root).to(sources[0].dtype)


def check(
    comm: TorchComm, rank: int, kind: str, tensors: list[tuple[torch.dtype, tuple[int, ...]]], **how: Any
) -> None:
    """One collective over ``tensors`` against the plain formula, and its sources unchanged."""
    reduction, root, in_place = how.get("reduction"), how.get("root"), how.get("in_place", False)
    device = how.get("device", "cpu")
    everyone = [[data(t, s, 100 * r + n).to(device) for n, (t, s) in enumerate(tensors)] for r in range(WORLD)]
    sources = tuple(everyone[rank][n].clone() for n in range(len(tensors)))
    if how.get("transposed"):
        sources = tuple(t.t().contiguous().t() for t in sources)
    wanted = [expected(kind, [e[n] for e in everyone], rank, reduction, root) for n in range(len(tensors))]
    results = (
        sources if in_place else tuple(torch.full_like(w, 3, memory_format=torch.contiguous_format) for w in wanted)
    )
    handle = comm.start(kind, sources, results, "g0", reduction, root, in_place, f"{kind} {how} {tensors}")
    comm.wait(handle)
    for n, (result, want) in enumerate(zip(results, wanted, strict=True)):
        torch.testing.assert_close(result, want, msg=lambda m: f"{handle.name}: {m}")
        if not in_place:
            assert torch.equal(sources[n], everyone[rank][n]), f"{handle.name} changed its source"


def every_kind(rank: int) -> None:
    comm = TorchComm({"g0": dist.group.WORLD}, 60)
    for dtype in (*FLOATS, *INTS, torch.bool, torch.complex64):
        for in_place in (False, True):
            for reduction in reductions_of(dtype):
                check(comm, rank, "all_reduce", [(dtype, (3, 4))], reduction=reduction, in_place=in_place)
            check(comm, rank, "broadcast", [(dtype, (5,))], root=1, in_place=in_place)
        for reduction in reductions_of(dtype):
            check(comm, rank, "reduce_scatter", [(dtype, (4, 3))], reduction=reduction)
        check(comm, rank, "all_gather", [(dtype, (3, 2))])
        check(comm, rank, "all_to_all", [(dtype, (6, 2))])


def test_every_kind_dtype_and_reduction() -> None:
    run_ranks(every_kind, world=WORLD)


def several_at_once(rank: int) -> None:
    comm = TorchComm({"g0": "0"}, 60)
    mixed = [(torch.float32, (4, 3)), (torch.float32, (2, 5)), (torch.int64, (6, 1)), (torch.float32, (8, 2))]
    for transposed in (False, True):
        for in_place in (False, True):
            check(comm, rank, "all_reduce", mixed, reduction="sum", in_place=in_place, transposed=transposed)
            check(comm, rank, "all_reduce", mixed[:1], reduction="avg", in_place=in_place, transposed=transposed)
            check(comm, rank, "broadcast", mixed, root=0, in_place=in_place, transposed=transposed)
            check(comm, rank, "broadcast", mixed[:1], root=1, in_place=in_place, transposed=transposed)
        for kind in ("all_gather", "all_to_all"):
            check(comm, rank, kind, mixed, transposed=transposed)
            check(comm, rank, kind, mixed[:1], transposed=transposed)
        check(comm, rank, "reduce_scatter", mixed, reduction="sum", transposed=transposed)
    check(comm, rank, "all_reduce", [(torch.float32, (0, 3))], reduction="sum")
    check(comm, rank, "all_gather", [(torch.float32, (0, 3)), (torch.float32, (2, 1))])


def test_coalesced_transposed_and_empty_tensors() -> None:
    run_ranks(several_at_once, world=WORLD)


def groups(rank: int) -> tuple[bool, str]:
    pair = dist.new_group([0, 1])
    assert find_group(pair) is pair
    assert find_group(dist.group.WORLD.group_name) is dist.group.WORLD
    assert find_group(pair.group_name).group_name == pair.group_name
    comm = TorchComm({"a": dist.group.WORLD, "b": pair.group_name}, 60)
    one, two = torch.full((3,), float(rank + 1)), torch.full((3,), float(rank + 10))
    first = comm.start("all_reduce", (one,), (one,), "a", "sum", None, True, "first")
    second = comm.start("all_reduce", (two,), (two,), "b", "max", None, True, "second")
    comm.wait(second)
    comm.wait(first)
    try:
        TorchComm({"g0": "no such group"}, 60)
    except Unsupported as error:
        return bool(torch.equal(one, torch.full((3,), 3.0)) and torch.equal(two, torch.full((3,), 11.0))), str(error)
    return False, ""


def test_groups_by_object_and_by_name() -> None:
    for right, message in run_ranks(groups, world=WORLD):
        assert right
        assert "'no such group'" in message
        assert "init_process_group" in message


def late_peer(rank: int) -> tuple[str, str, float]:
    comm = TorchComm({"g0": dist.group.WORLD}, 1.0)
    x, y = torch.ones(8), torch.ones(8)
    if rank == 1:
        time.sleep(3)
        dist.all_reduce(x)
        dist.all_reduce(y)
        return "", "", 0.0
    started = time.monotonic()
    handle = comm.start("all_reduce", (x,), (x,), "g0", "sum", None, True, "p7 = all_reduce.sum at train.py:41")
    other = comm.start("all_reduce", (y,), (y,), "g0", "sum", None, True, "p8")
    try:
        comm.wait(handle)
    except DeadlineExceeded as error:
        assert not comm.drain((None, handle, other))
        return type(error).__name__, str(error), time.monotonic() - started
    return "no error", "", 0.0


def test_a_late_rank_is_an_error_in_time() -> None:
    kind, message, seconds = run_ranks(late_peer, world=WORLD)[0]
    assert kind == "DeadlineExceeded"
    assert 0.9 < seconds < 1.9  # one deadline, not a second one for the other collective
    assert "rank 0: p7 = all_reduce.sum at train.py:41 on group g0 (2 ranks" in message
    assert "1 s" in message


def refused(rank: int) -> tuple[str, list[float]]:
    comm = TorchComm({"g0": dist.group.WORLD}, 30.0)
    mixed = (torch.full((3,), float(rank)), torch.ones(3, dtype=torch.bool))
    try:
        comm.start("all_reduce", mixed, mixed, "g0", "avg", None, True, "p7 = all_reduce.avg at train.py:41")
    except DCompileError as error:
        check(comm, rank, "all_reduce", [(torch.float32, (3,))], reduction="avg")
        return str(error), mixed[0].tolist()
    return "no error", []


def test_a_refused_collective_has_launched_nothing() -> None:
    for rank, (message, untouched) in enumerate(run_ranks(refused, world=WORLD)):
        assert "train.py:41" in message
        assert "avg over ranks is not defined for torch.bool" in message
        assert untouched == [rank] * 3


def dead_peer(rank: int) -> str:
    pair = dist.new_group([0, 1])
    comm = TorchComm({"g0": pair}, 30.0)
    x = torch.ones(8)
    if rank == 1:
        del comm
        dist.destroy_process_group(pair)
        return ""
    try:
        comm.wait(comm.start("all_reduce", (x,), (x,), "g0", "sum", None, True, "p7"))
    except DCompileError as error:
        return str(error)
    return "no error"


def test_a_rank_that_is_gone_is_an_error() -> None:
    message = run_ranks(dead_peer, world=WORLD)[0]
    assert "rank 0: p7 on group g0" in message
    assert "another rank" in message


def disagree(rank: int) -> list[str]:
    comm = TorchComm({"g0": dist.group.WORLD}, 30.0)
    agree_on(comm.teams, "forward", "same", ["a"], 20.0)
    agree_on(comm.teams, "forward", "same again", ["a"], 20.0)
    try:
        agree_on(comm.teams, "forward", f"program {rank}", ["a", f"b{rank}"], 20.0)
    except Divergence as error:
        return str(error).splitlines()
    return []


def test_ranks_with_different_programs_all_say_so() -> None:
    for lines in run_ranks(disagree, world=WORLD):
        assert "forward" in lines[0]
        assert "line 2" in lines[0]
        assert "b0" in lines[1]
        assert "b1" in lines[2]


STEP = """
graph f(x: f32[64, 48], w: f32[48, 32]) {
  y: f32[64, 32] = extern aten.mm.default(%x, %w) -> aten.mm.out  # aten.mm.default @m.py:4
  p: pending in place (g: f32[64, 32]) = start all_reduce.sum (y) @g0[2]  # c10d.all_reduce @m.py:5
  z: f32[64, 48] = pointwise (i0: 64, i1: 48) tanh(x[i0, i1])
  g: f32[64, 32] = wait p
  s: f32[32, 32] = view g (i0: 32, i1: 32) -> [i0, i1]
  q: pending (o: f32[64, 32]) = start all_gather (s) @g0[2]  # c10d.all_gather @m.py:7
  o: f32[64, 32] = wait q
  r: f32[64, 32] = pointwise (i0: 64, i1: 32) o[i0, i1] - g[i0, i1]
  return %z, %r, %o
}
"""


def whole_program(rank: int) -> None:
    recorder = Recorder()
    run = program(STEP, TorchComm({"g0": dist.group.WORLD}, 60), recorder)
    for call in range(3):
        each = [torch.randn(64, 48, generator=torch.Generator().manual_seed(10 * call + r)) for r in range(WORLD)]
        w = torch.randn(48, 32, generator=torch.Generator().manual_seed(call))
        z, r, o = run([each[rank].clone(), w])
        g = sum(x @ w for x in each)
        torch.testing.assert_close(z, each[rank].tanh())
        torch.testing.assert_close(o, torch.cat([g[:32], g[:32]]))
        torch.testing.assert_close(r, o - g, atol=1e-4, rtol=1e-5)
    last = recorder.timelines[-1]
    flights = [span for span in last.spans if span.lane == "g0"]
    assert [span.name for span in flights] == ["p = all_reduce.sum at m.py:5", "q = all_gather at m.py:7"]
    assert last.communication_us > 0
    assert 0 <= last.hidden_us <= last.communication_us
    assert len(recorder.timelines) == 3
    assert len(waiting_blocks(run)) == 1


def test_a_program_with_collectives_runs_again_and_again() -> None:
    run_ranks(whole_program, world=WORLD)


def coalesced_where_they_lie(rank: int) -> None:
    """Buckets on NCCL: every kind and reduction, one launch a bucket, against the formula."""
    comm = TorchComm({"g0": dist.group.WORLD}, 60)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        shapes = [(dtype, (4, 3)), (dtype, (0, 3)), (dtype, (2,)), (dtype, (8, 1, 5))]
        check(comm, rank, "all_gather", shapes, device="cuda")
        for reduction in reductions_of(dtype):
            if reduction not in ("band", "bor", "bxor"):
                check(comm, rank, "reduce_scatter", shapes, reduction=reduction, device="cuda")
                for in_place in (False, True):
                    check(comm, rank, "all_reduce", shapes, reduction=reduction, in_place=in_place, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="one GPU a rank")
def test_buckets_on_nccl() -> None:
    run_ranks(coalesced_where_they_lie, world=WORLD, backend="nccl")
