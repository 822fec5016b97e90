"""Sequence parallel layers whose gathers and reductions are cut into parts, on ranks, against eager DTensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from tests.multi_gpu.ranks import run_ranks

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]

WIDTH, HIDDEN, BATCH, LENGTH = 16, 32, 4, 6

SLOW_LINK = """
name = "a link that hides under compute"
[compute]
flops_per_us = 1.0e4
bytes_per_us = 2.0e4
launch_us = 0.01
call_us = 0.01
matmul_flops_per_us = { f32 = 100.0 }
[[level]]
ranks = 64
alpha_us = 0.01
bytes_per_us = 10.0
contention = 0.0
"""
"""At these prices a product of the test's size takes about as long as its gather, and parts cost nothing."""


class Layer(nn.Module):
    """Two products of one gathered activation, one of them with a bias, and one that is reduced and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _layers(dim: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = nn.Sequential(Layer(), Layer()).to(device)
    plan = {
        "norm": SequenceParallel(sequence_dim=dim),
        "gate": ColwiseParallel(input_layouts=Shard(dim)),
        "up": ColwiseParallel(input_layouts=Shard(dim)),
        "down": RowwiseParallel(output_layouts=Shard(dim)),
    }
    for layer in model:
        parallelize_module(layer, mesh, plan)
    return model


def _step(rank: int, dim: int, topology: str, ways: tuple[str, ...]) -> dict[str, Any]:
    """Output, gradients, and what the compiled programs launch, of each way."""
    import dcompile
    from dcompile.backend import observing
    from dcompile.collectives.nodes import Start

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found: dict[str, Any] = {}
    for way in ways:
        torch.compiler.reset()
        model = _layers(dim, device)
        launches: dict[str, list[str]] = {}
        taken: list[str] = []

        def observe(built: Any, launches: dict[str, list[str]] = launches, taken: list[str] = taken) -> None:
            starts = [node for node in built.plan.graph.nodes if isinstance(node, Start)]
            launches[built.name.rstrip("0123456789")] = [start.kind.value for start in starts]
            taken += [v.subject for v in built.plan.verdicts if v.stage == "async_matmul" and v.decision == "taken"]

        options: dict[str, Any] = {"topology": topology, "skip": {"async_matmuls"} if way == "whole" else set()}
        run = model if way == "eager" else dcompile.compile(model, fullgraph=True, **options)
        generator = torch.Generator().manual_seed(rank)
        shape = (BATCH, LENGTH, WIDTH) if dim else (LENGTH * BATCH, 1, WIDTH)
        x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        with observing(observe):
            y = run(x)
            y.square().mean().backward()
        gradients = [p.grad.to_local().cpu() for p in model.parameters()]
        found[way] = {"y": y.detach().cpu(), "x": x.grad.cpu(), "gradients": gradients}
        found[way] |= {"launches": launches, "taken": taken}
    return found


@pytest.mark.parametrize("dim", [1, 0], ids=["batch first", "sequence first"])
def test_parts_give_eagers_numbers(dim: int, tmp_path: Path) -> None:
    topology = tmp_path / "link.toml"
    topology.write_text(SLOW_LINK)
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    ways = ("eager", "whole", "parts")
    for found in run_ranks(_step, dim, str(topology), ways, backend=backend, deadline_s=280):
        for way in ("whole", "parts"):
            for key in ("y", "x", "gradients"):
                torch.testing.assert_close(found[way][key], found["eager"][key], atol=2e-5, rtol=2e-5)
        assert not found["whole"]["taken"]
        assert len(found["parts"]["taken"]) == 2, "both programs"
        whole, parts = (found[way]["launches"] for way in ("whole", "parts"))
        assert len(parts["forward"]) > len(whole["forward"])
        assert whole["forward"].count("all_gather") == 2, "both products of a layer read one gather"
        assert whole["backward"].count("reduce_scatter") == 2, "and their gradients are added before one reduction"
