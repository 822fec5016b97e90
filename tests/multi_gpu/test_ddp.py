"""DistributedDataParallel around and inside compile: gradients of eager, all-reduces in the backward graph."""

from __future__ import annotations

import contextlib
import tempfile
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


class Net(nn.Module):
    """Two layers, buffers that follow the batches, and a parameter that may go unused."""

    def __init__(self, recompute: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.spare = nn.Linear(8, 3) if spare else None
        self.recompute = recompute

    def _hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self._hidden, x, use_reentrant=False) if self.recompute else self._hidden(x)
        return self.last(self.norm(hidden))  # type: ignore[no-any-return]


CASES: dict[str, dict[str, Any]] = {
    "around": {},
    "inside": {"inside": True},
    "small buckets, views": {"ddp": {"bucket_cap_mb": 1, "gradient_as_bucket_view": True}},
    "static graph, recomputed": {"ddp": {"static_graph": True}, "net": {"recompute": True}, "inside": True},
    "unused parameters": {"ddp": {"find_unused_parameters": True}, "net": {"spare": True}, "outside": True},
    "accumulation": {"accumulate": True},
    "autocast and scaling": {"autocast": True, "inside": True},
}


def _train(model: nn.Module, rank: int, case: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every step and the buffers at the end."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(5, 6, generator=generator)
        local = case.get("accumulate") and step % 2 == 0
        with model.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(case.get("autocast"))):
                loss = model(x).float().square().sum()
            scaler.scale(loss).backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if not local:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return gradients, [b.clone() for b in model.buffers()]


def _every_case(rank: int) -> dict[str, Any]:
    import dcompile

    found = {}
    for name, case in CASES.items():
        sides: list[Any] = []
        for compiles, exact in ((False, True), (False, False), (True, False)):
            torch.manual_seed(0)
            torch.compiler.reset()
            dcompile.reset_counters()
            net: Any = Net(**case.get("net", {}))
            options: dict[str, Any] = {"backend": "dcompile", "options": {"cache_dir": tempfile.mkdtemp()}}
            if compiles and not case.get("inside"):
                net = torch.compile(net, **options)
            model: Any = DistributedDataParallel(net, **case.get("ddp", {}))
            if compiles and case.get("inside"):
                model.forward = torch.compile(model.forward, **options)
            sides.append(_train(model, rank, case | {"autocast": case.get("autocast") and not exact}))
        counted = dcompile.counters()
        found[name] = (*sides, counted.graphs, counted.collectives, counted.fallbacks)
    return found


def _error(found: list[list[Tensor]], exact: list[list[Tensor]]) -> float:
    """Largest distance of a tensor from the exact one, in units of its norm."""
    pairs = zip(chain.from_iterable(found), chain.from_iterable(exact), strict=True)
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)


def test_gradients_of_every_way_to_wrap_are_eagers() -> None:
    for found in run_ranks(_every_case, deadline_s=280):
        for name, (exact, eager, got, graphs, collectives, fallbacks) in found.items():
            allowed = 2 * _error(eager, exact) if CASES[name].get("autocast") else 1e-5
            assert _error(got, exact) <= allowed, name
            outside = [text for text in fallbacks if "outside the graph" in text]
            assert bool(outside) == bool(CASES[name].get("outside")), (name, outside)
            assert graphs == 2, f"{name}: one forward and one backward graph"
            assert (collectives > 0) is not bool(CASES[name].get("outside")), name
