"""Tensor parallel layers that do not divide evenly: each rank runs the program of its shapes, warm cache or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.multi_gpu.ranks import run_ranks

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def _step(rank: int, folder: str) -> dict[str, Any]:
    """Output and gradients of eager and compiled, and how many programs came from the cache."""
    import dcompile

    found: dict[str, Any] = {}
    for way in ("eager", "compiled"):
        torch.compiler.reset()
        dcompile.reset_counters()
        torch.manual_seed(0)
        model = Layer()
        plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        run = model if way == "eager" else dcompile.compile(model, fullgraph=True, cache_dir=folder)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run(x)
        y.square().mean().backward()
        local = [parameter.grad.to_local() for parameter in model.parameters()]
        found[way] = {"y": y.detach(), "x": x.grad, "gradients": local, "rows": model.up.weight.to_local().shape[0]}
    counters = dcompile.counters()
    return found | {"hits": counters.cache_hits, "misses": counters.cache_misses}


def test_ranks_of_unequal_shards_load_their_own_programs(tmp_path: Path) -> None:
    for temperature in ("cold", "warm"):
        results = run_ranks(_step, str(tmp_path), deadline_s=200)
        assert [found["eager"]["rows"] for found in results] == [3, 2]
        for found in results:
            for key in ("y", "x", "gradients"):
                torch.testing.assert_close(found["compiled"][key], found["eager"][key], atol=1e-5, rtol=1e-5)
            if temperature == "warm":
                assert (found["hits"], found["misses"]) == (2, 0)
