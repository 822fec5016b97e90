"""Prices measured on this machine: how long collectives take, how much they slow compute beside them, how fast it is.

Every rank of a group takes part. What they measured travels through the group's store, so all ranks go on with the same
prices; a rank that does not come is named after the deadline. A collective takes as long as on the rank where it takes
longest, all having started together; compute takes the median of the ranks. Results are kept on disk under what they
depend on: hosts, backend, number of ranks, device, threads, versions, and the environment's settings of the links.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcompile.analyse.calibration import Calibration, Prices
from dcompile.collectives.nodes import Kind, Via
from dcompile.errors import DCompileError
from dcompile.runtime.agree import exchange
from dcompile.runtime.board import at_new_world
from dcompile.runtime.calibrate_peers import peer_runs, prices_of, reach
from dcompile.runtime.comm import Team, find_group
from dcompile.runtime.few_ctas import few_ctas

SIZES = (4 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20, 32 << 20)
"""Payload bytes measured; between them time is taken to be linear. The largest is as long as buckets get on slow links
before their latency no longer matters."""

ROUNDS, SECONDS = 15, 8.0
"""Each size is measured this often, in turns, so that a disturbance does not meet all repeats of one size; less often
once so much time has passed on every rank."""

LEAST_ROUNDS = 3
"""Rounds that count whatever they take; the first one does not, it opens connections."""

LINK_SETTINGS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "UCX_", "FI_")
"""How environment variables begin that change what a collective costs."""

NO_LINK_SETTINGS = ("NCCL_DEBUG", "NCCL_COMM_ID", "TORCH_NCCL_DUMP", "TORCH_NCCL_TRACE", "TORCH_NCCL_DEBUG")
"""Those among them that only say what is written down, or where ranks meet."""

FORMAT = 3
"""Number of the way in which results are measured and kept: those of others are not read."""

CONTENTION_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20}
"""The collective run beside matrix products: a bucket of middle size. On GPUs smaller ones are latency only."""

_numbers: Counter[str] = Counter()
_known: dict[str, Calibration] = {}


@at_new_world
def forget() -> None:
    """A new world counts its calibrations anew, and may lie on other links."""
    _numbers.clear()
    _known.clear()


def calibration_of(name: Any) -> Calibration | None:
    """What ``calibrate`` has found in this process for the group called ``name``; None if it was not called."""
    return _known.get(str(find_group(name).group_name)) if _known else None


def calibrate(group: dist.ProcessGroup | None, folder: Path | None, deadline_s: float) -> Calibration:
    """Measure ``group``, or load what was measured before; called by all its ranks.

    Args:
        group: None for all ranks.
        folder: where results are kept; None to keep none.

    Raises:
        DCompileError: there is nothing to measure on the group's device.
        DeadlineExceeded: naming the ranks that did not come.
    """
    if group is None:
        if not dist.is_initialized():
            raise DCompileError("calibrate needs a process group: call torch.distributed.init_process_group first")
        group = dist.group.WORLD
    assert group is not None, "an initialised torch.distributed has a default group"
    team = Team("calibration", group, dist.get_rank(group), dist.get_world_size(group))
    device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda(group) else torch.device("cpu")
    name = str(group.group_name)
    _numbers[name] += 1
    talk = exchange(team, deadline_s, f"calibration/{_numbers[name]}")
    path = _path(folder, talk.all("facts", json.dumps(link_facts(group, device))))
    stored = talk.all("stored", path.read_text() if path is not None and path.exists() else "")
    if stored[0]:  # the first rank's counts, so that all have the same though they share no disk
        found = Calibration.from_json(stored[0])
    else:
        mine = _measure(team, device, lambda key, value: talk.all(key, value))
        found = _median([Calibration.from_json(text) for text in talk.all("measured", mine.to_json())])
        if path is not None and (team.rank == 0 or not path.exists()):
            _write(path, found.to_json())
    _known[name] = found
    return found


def undisturbed(times: list[float]) -> float:
    """The lower quartile: what else runs on the machine only ever adds."""
    return sorted(times)[len(times) // 4]


def _on_cuda(group: dist.ProcessGroup) -> bool:
    return "nccl" in str(dist.get_backend(group)) and torch.cuda.is_available()


def link_facts(group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """What the prices of ``group`` depend on, as this rank sees it: host, backend, device, threads, versions, and every
    setting of the links in the environment."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    backend = str(dist.get_backend_config(group))
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(LINK_SETTINGS) and not name.startswith(NO_LINK_SETTINGS)
    }
    return [socket.gethostname(), backend, model, cores, torch.get_num_threads(), torch.__version__, settings]


def _path(folder: Path | None, facts: list[str]) -> Path | None:
    """Where results are kept; ``facts``: those of all ranks, in their order."""
    if folder is None:
        return None
    return folder / "links" / f"{hashlib.sha256(json.dumps([FORMAT, *facts]).encode()).hexdigest()[:24]}.json"


def _write(path: Path, text: str) -> None:
    """Whole or not at all, however many ranks write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


Key = tuple[Kind, int]
"""A kind of collective and its payload in bytes."""


def _measure(team: Team, device: torch.device, agree: Callable[[str, str], list[str]]) -> Calibration:
    if team.size < 2:
        raise DCompileError("a group of one rank has no links to calibrate")
    beside = (Kind.ALL_REDUCE, CONTENTION_BYTES[device.type])
    points = measured_us([*((kind, size) for kind in KINDS for size in SIZES), beside], team, device, agree)
    curves = {kind: tuple((size, points[kind, size]) for size in SIZES) for kind in KINDS}
    return Calibration(
        ranks=team.size,
        curves=curves,
        contention=_contention(_prepared(*beside, team, device), device, points[beside], _meeting(team, device)),
        matmul_flops_per_us=_matmul_flops_per_us(device),
        bytes_per_us=_bytes_per_us(device),
        others=_others(team, device, agree),
    )


def _others(team: Team, device: torch.device, agree: Callable[[str, str], list[str]]) -> dict[Via, Prices]:
    """Prices of the other lowerings that this group can use."""
    if device.type != "cuda":
        return {}
    beside = CONTENTION_BYTES[device.type]
    few = replace(team, process_group=few_ctas(team.process_group))
    runs: dict[Key, Callable[[], Any]] = {
        (kind, size): _prepared(kind, size, few, device) for kind in KINDS for size in (*SIZES, beside)
    }
    times = timed_us(runs, team, device, lambda key, value: agree(f"few {key}", value))
    meet = _meeting(team, device)
    slowed = _contention(runs[Kind.ALL_REDUCE, beside], device, times[Kind.ALL_REDUCE, beside], meet)
    others = {Via.FEW_CTAS: prices_of(times, slowed)}
    found = reach(team, device, agree, beside)
    if found is not None:
        runs = peer_runs(*found, (*SIZES, beside), device)
        times = timed_us(runs, team, device, lambda key, value: agree(f"peers {key}", value))
        slowed = _contention(runs[Kind.ALL_GATHER, beside], device, times[Kind.ALL_GATHER, beside], meet)
        others[Via.PEERS] = prices_of(times, slowed)
    return others


def measured_us(
    keys: Sequence[Key], team: Team, device: torch.device, agree: Callable[[str, str], list[str]]
) -> dict[Key, float]:
    """Undisturbed microseconds of each collective of the backend; see ``timed_us``."""
    return timed_us({key: _prepared(*key, team, device) for key in keys}, team, device, agree)


def timed_us(
    runs: Mapping[Key, Callable[[], Any]], team: Team, device: torch.device, agree: Callable[[str, str], list[str]]
) -> dict[Key, float]:
    """Undisturbed microseconds of each collective; the same on all ranks, all of which must call it.

    The collectives take turns. Before each one the ranks meet, so that none of them counts its wait for a late one.
    A collective takes as long as it takes the rank that is last to have it.

    Args:
        agree: gives the texts of all ranks under a key, see ``agree.exchange``.
    """
    meet = _meeting(team, device)
    times: list[list[float]] = []
    began = time.perf_counter()
    for number in range(ROUNDS):
        times.append([])
        for run in runs.values():
            times[-1].append(_timed_us(run, device, meet))
        late = agree(f"round{number}", str(time.perf_counter() - began > SECONDS))
        if number >= LEAST_ROUNDS and "True" in late:
            break
    ranks = [json.loads(text) for text in agree("times", json.dumps(times[1:]))]  # the first round opens connections
    slowest = [[max(of) for of in zip(*rows, strict=True)] for rows in zip(*ranks, strict=True)]
    return {key: undisturbed([row[n] for row in slowest]) for n, key in enumerate(runs)}


MEETINGS = 2
"""Small all-reduces before each measurement: after the first all ranks are there, the second lets them go together."""


def _meeting(team: Team, device: torch.device) -> Callable[[], None]:
    """What lets all ranks go on together."""
    small = _prepared(Kind.ALL_REDUCE, 4 * team.size, team, device)

    def meet() -> None:
        for _ in range(MEETINGS):
            small().wait()

    return meet


def _prepared(kind: Kind, nbytes: int, team: Team, device: torch.device) -> Callable[[], Any]:
    """One collective of ``nbytes`` payload, as a function that launches it and gives its work."""
    count = max(nbytes // 4 // team.size, 1) * team.size
    whole, part = torch.zeros(count, device=device), torch.zeros(count // team.size, device=device)
    other = torch.zeros(count, device=device)
    group = team.process_group
    root = dist.get_global_rank(group, 0)
    launches: dict[Kind, Callable[[], Any]] = {
        Kind.ALL_REDUCE: lambda: dist.all_reduce(whole, group=group, async_op=True),
        Kind.ALL_GATHER: lambda: dist.all_gather_into_tensor(whole, part, group=group, async_op=True),
        Kind.REDUCE_SCATTER: lambda: dist.reduce_scatter_tensor(part, whole, group=group, async_op=True),
        Kind.BROADCAST: lambda: dist.broadcast(whole, root, group=group, async_op=True),
        Kind.ALL_TO_ALL: lambda: dist.all_to_all_single(other, whole, group=group, async_op=True),
    }
    return launches[kind]


KINDS = (Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.BROADCAST, Kind.ALL_TO_ALL)


def _timed_us(run: Callable[[], Any], device: torch.device, meet: Callable[[], None] = lambda: None) -> float:
    """Microseconds from launch to completion; ``meet`` is called before.

    On a GPU they count in its stream, which is busy until the host has launched everything: the host's own time does
    not count, because in a program it runs ahead.
    """
    if device.type == "cuda":
        return _gpu_us(run, device, meet)
    meet()
    began = time.perf_counter()
    run().wait()
    return (time.perf_counter() - began) * 1e6


def _gpu_us(run: Callable[[], Any], device: torch.device, meet: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.mm(_busy(device), _busy(device))
    meet()
    began.record()
    run().wait()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) * 1e3


@lru_cache(maxsize=1)
def _busy(device: torch.device) -> torch.Tensor:
    """Its square takes some 3 ms, in which a host launches whatever is measured."""
    return torch.rand(4096, 4096, device=device)


def _contention(launch: Callable[[], Any], device: torch.device, transfer_us: float, meet: Callable[[], None]) -> float:
    """Time a collective adds to matrix products that last four times as long, as a share of its own time."""
    side, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b, out = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(3))
    once_us = statistics.median(_timed_us(lambda: _Done(torch.mm(a, b, out=out)), device) for _ in range(7))
    count = max(1, round(4 * transfer_us / once_us))

    def compute() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    def alone() -> Any:
        compute()
        return _Done(out)

    def beside() -> Any:
        work = launch()
        compute()
        return work

    pairs = [(_timed_us(alone, device, meet), _timed_us(beside, device, meet)) for _ in range(5)]
    added = statistics.median(with_it - without for without, with_it in pairs[1:])
    return min(max(added / transfer_us, 0.0), 1.0)


class _Done:
    """What has been computed already, where a work is expected."""

    def __init__(self, _: torch.Tensor) -> None:
        pass

    def wait(self) -> None:
        """There is nothing to wait for."""


def _matmul_flops_per_us(device: torch.device) -> float:
    side = 4096 if device.type == "cuda" else 512
    a, b = torch.zeros(side, side, device=device), torch.zeros(side, side, device=device)
    return 2 * side**3 / min(_timed_us(lambda: _Done(torch.mm(a, b)), device) for _ in range(7))


def _bytes_per_us(device: torch.device) -> float:
    """Bytes read and written a microsecond by a copy that fits no cache."""
    nbytes = 64 << 20
    a = torch.zeros(nbytes // 4, device=device)
    b = torch.zeros_like(a)
    return 2 * nbytes / min(_timed_us(lambda: _Done(b.copy_(a)), device) for _ in range(4))


def _median(found: list[Calibration]) -> Calibration:
    """Number by number over the ranks; sorted first, so that every rank gets the same bits."""

    def middle(values: list[float]) -> float:
        return statistics.median(sorted(values))

    return Calibration(
        ranks=found[0].ranks,
        curves={
            kind: tuple((size, middle([dict(one.curves[kind])[size] for one in found])) for size in SIZES)
            for kind in KINDS
        },
        contention=middle([one.contention for one in found]),
        matmul_flops_per_us=middle([one.matmul_flops_per_us for one in found]),
        bytes_per_us=middle([one.bytes_per_us for one in found]),
        others={
            via: replace(found[0].others[via], contention=middle([one.others[via].contention for one in found]))
            for via in found[0].others
        },
    )
