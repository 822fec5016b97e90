"""Copies into the memory of other ranks; here ranks are threads of one process, which share all memory anyway."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug
from dcompile.plan import Home
from dcompile.reference import run_reference
from dcompile.runtime.comm import Handle
from dcompile.runtime.peers import Peers
from tests.unit.codegen.programs import plan_of, program


class Host:
    """Memory of ranks that are threads: the n-th window of each rank belongs together."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.memory: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
        self.meetings = 0

    def peers(self, rank: int) -> Peers:
        return Peers(rank, self.ranks, lambda nbytes, _: Window(self, rank, nbytes))


class Window:
    """See ``peers.Window``."""

    def __init__(self, host: Host, rank: int, nbytes: int) -> None:
        self.host, self.number = host, len(host.memory[rank])
        self.memory = torch.full((nbytes,), 77, dtype=torch.uint8)
        host.memory[rank].append(self.memory)
        host.barrier.wait()

    def of(self, rank: int) -> torch.Tensor:
        return self.host.memory[rank][self.number]

    def meet(self) -> None:
        if self.host.barrier.wait() == 0:
            self.host.meetings += 1


class PeerComm:
    """A communicator all of whose collectives are copies between peers."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def start(self, kind: str, sources: Any, results: Any, *rest: Any, via: str = "library") -> Handle:
        assert via == "peers"
        handle = Handle(kind, "g0")
        handle.works.append(self.peers.launch(kind, sources, results))
        return handle

    def wait(self, handle: Handle) -> None:
        handle.works[0].wait()

    def drain(self, handles: Any, patient: bool) -> bool:
        return True

    def share(self, group: str, nbytes: int, device: torch.device) -> Any:
        return self.peers.allocate(nbytes, device)


def on_ranks(ranks: int, body: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(body, range(ranks)))


def data(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_every_rank_gets_every_share(ranks: int, dtype: torch.dtype) -> None:
    host = Host(ranks)
    shapes = ((ranks, 3), (0, 2), (2 * ranks,))
    sent = [[data(dtype, shape, 10 * rank + n) for n, shape in enumerate(shapes)] for rank in range(ranks)]

    def run(rank: int) -> list[list[torch.Tensor]]:
        peers = host.peers(rank)
        block = peers.allocate(4096, torch.device("cpu"))
        found = []
        for kind, times in (("all_gather", ranks), ("all_to_all", 1)):
            first, results = 64, []
            for source in sent[rank]:
                nbytes = source.numel() * source.element_size() * times
                flat = block.memory[first : first + nbytes].view(dtype)
                results.append(flat.view(source.shape[0] * times, *source.shape[1:]))
                first += -(-nbytes // 64) * 64
            peers.launch(kind, sent[rank], results).wait()
            found.append([result.clone() for result in results])
        return found

    for rank, (gathered, swapped) in enumerate(on_ranks(ranks, run)):
        for n in range(len(shapes)):
            assert torch.equal(gathered[n], torch.cat([sent[other][n] for other in range(ranks)]))
            assert torch.equal(swapped[n], torch.cat([sent[other][n].chunk(ranks)[rank] for other in range(ranks)]))
    assert host.meetings == 4, "before and after the copies of each launch"


def test_results_outside_the_window_are_a_bug() -> None:
    host = Host(1)
    peers = host.peers(0)
    block = peers.allocate(64, torch.device("cpu"))
    inside, outside = block.memory[:8], torch.empty(8, dtype=torch.uint8)
    with pytest.raises(CompilerBug, match="one window"):
        peers.launch("all_gather", (outside, outside), (inside, outside))
    with pytest.raises(CompilerBug, match="no copy"):
        peers.launch("all_reduce", (outside,), (inside,))


STEP = """\
graph backward(x: f32[4, 3], y: f32[2, 3]) {
  a: f32[4, 3] = pointwise (i0: 4, i1: 3) x[i0, i1] * 2.0:f32
  p: pending (g: f32[8, 3], h: f32[4, 3]) = start all_gather (a, y) @g0[2] via peers
  b: f32[4, 3] = pointwise (i0: 4, i1: 3) x[i0, i1] + 1.0:f32
  g: f32[8, 3], h: f32[4, 3] = wait p
  c: f32[4, 3] = pointwise (i0: 4, i1: 3) g[i0, i1] + g[i0 + 4, i1] * h[i0, i1] + b[i0, i1]
  q: pending (s: f32[4, 3]) = start all_to_all (c) @g0[2] via peers
  s: f32[4, 3] = wait q
  out: f32[4, 3] = pointwise (i0: 4, i1: 3) s[i0, i1] - c[i0, i1]
  return %out
}
"""


def test_a_program_receives_in_memory_that_all_ranks_share() -> None:
    plan = plan_of(STEP)
    homes = {name: plan.storages[plan.slots[name].storage].home for name in ("a", "g", "h", "c", "s")}
    assert homes == {"a": Home.ARENA, "g": Home.SHARED, "h": Home.SHARED, "c": Home.ARENA, "s": Home.SHARED}
    assert plan.arena_bytes["shared_g0"] == 192, "the second launch receives where the first did"
    host, graph = Host(2), parse_graph(STEP)
    inputs = [[[data(torch.float32, (4, 3), r + 9 * n), data(torch.float32, (2, 3), r + 5 * n)] for r in range(2)]
              for n in range(3)]  # fmt: skip

    def run(rank: int) -> list[torch.Tensor]:
        compiled = program(plan, PeerComm(host.peers(rank)))  # type: ignore[arg-type]
        return [compiled(list(call[rank]))[0] for call in inputs]

    found = on_ranks(2, run)
    for n, call in enumerate(inputs):
        wanted = run_reference([graph, graph], [list(one) for one in call])
        for rank in range(2):
            torch.testing.assert_close(found[rank][n], wanted[rank][0])
