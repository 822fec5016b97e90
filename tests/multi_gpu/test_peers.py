"""Copies between GPUs that map each other's memory: the same numbers as the backend's, and chosen where calibrated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dcompile
from dcompile.backend import observing
from dcompile.collectives.nodes import Start, Via
from dcompile.pipeline.program import Built
from dcompile.runtime.comm import TorchComm
from tests.multi_gpu.ranks import run_ranks

WORLD = 2

pytestmark = [
    pytest.mark.multi_rank,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="one GPU a rank"),
]


def copies(rank: int) -> None:
    """Beside matrix products and again and again, against NCCL's own gather."""
    device = torch.device("cuda", rank)
    comm = TorchComm({"g0": dist.group.WORLD}, 60)
    block = comm.share("g0", 64 << 20, device)
    busy = torch.randn(2048, 2048, device=device)
    for n in range(20):
        torch.manual_seed(100 * n + rank)
        sources = (torch.randn(1 << 20, 3, device=device), torch.randn(7, 5, device=device).bfloat16())
        places = (block.memory[: 24 << 20].view(torch.float32), block.memory[32 << 20 :][:280].view(torch.bfloat16))
        results = (places[0].view(2 << 20, 3), places[1].view(28, 5)[:14])
        handle = comm.start("all_gather", sources, results, "g0", None, None, False, f"gather {n}", via="peers")
        product = busy @ busy
        comm.wait(handle)
        for source, result in zip(sources, results, strict=True):
            wanted = torch.empty_like(result)
            dist.all_gather_into_tensor(wanted, source)
            assert torch.equal(result, wanted), f"launch {n}"
        swapped = block.memory[: 12 << 20].view(torch.float32).view(1 << 20, 3)
        handle = comm.start(
            "all_to_all", sources[:1], (swapped,), "g0", None, None, False, f"exchange {n}", via="peers"
        )
        comm.wait(handle)
        wanted = torch.empty_like(swapped)
        dist.all_to_all_single(wanted, sources[0])
        assert torch.equal(swapped, wanted), f"exchange {n}"
        del product


def test_copies_between_gpus_equal_nccl() -> None:
    run_ranks(copies, world=WORLD, backend="nccl")


def steps(rank: int) -> tuple[list[str], bool]:
    """How the gradients of mixed-precision training travel, and whether they are the same to the bit either way."""
    device = torch.device("cuda", rank)
    found = dcompile.calibrate()
    assert set(found.others) == {Via.FEW_CTAS, Via.PEERS}
    gradients: list[list[torch.Tensor]] = []
    vias: list[str] = []
    for skip in ("exchange_sums,choose_lowerings", ""):
        torch.compiler.reset()
        torch.manual_seed(0)
        layers = [nn.Linear(512, 512, device=device) for _ in range(4)]
        model = dcompile.data_parallel(nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2], layers[3]))
        seen: list[Built] = []
        compiled = dcompile.compile(model, skip=frozenset(skip.split(",")) - {""})
        with observing(seen.append):
            for n in range(3):
                torch.manual_seed(10 * n + rank)
                data = torch.randn(256, 512, device=device)
                model.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = compiled(data).square().mean()
                loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        starts = [node for b in seen if b.plan for node in b.plan.graph.nodes if isinstance(node, Start)]
        vias.append(" ".join(sorted({f"{start.kind.value} via {start.via.value}" for start in starts})))
    same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    return vias, same and len(gradients[0]) == 8


@pytest.mark.slow
def test_gradients_are_the_same_to_the_bit_however_they_travel() -> None:
    for (library, peers), same in run_ranks(steps, world=WORLD, backend="nccl", deadline_s=240.0):
        assert library == "all_reduce via library"
        assert "all_gather via peers" in peers
        assert same


def refuses(rank: int) -> Any:
    return [via.value for via in dcompile.calibrate().others]


def test_without_peer_access_only_the_backend_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert run_ranks(refuses, world=WORLD, backend="nccl") == [["few_ctas"], ["few_ctas"]]
