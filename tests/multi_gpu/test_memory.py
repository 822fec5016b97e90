"""Graphs that one rank captured are recalled by the others, from a shared folder or through the store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


def function(x: Tensor, group: str) -> Tensor:
    reduced = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x * 2, "sum", group))
    return torch.tanh(reduced) * x


def recalls(rank: int, folder: str, shared: bool) -> tuple[Tensor, int, int]:
    """What the ranks compute, and how many graphs this rank and all ranks recalled, in a run of two compiles."""
    import dcompile

    assert dist.group.WORLD is not None
    cache = Path(folder) if shared else Path(folder) / str(rank)
    name = str(dist.group.WORLD.group_name)
    x = torch.full((8,), 0.25 * (rank + 1), requires_grad=True)
    y = dcompile.compile(function, cache_dir=cache)(x, name)
    y.sum().backward()
    dist.barrier()
    cold = dcompile.counters().captures_recalled
    torch._dynamo.reset()
    dcompile.compile(function, cache_dir=cache)(x.detach().requires_grad_(), name).sum().backward()
    return y.detach(), cold, dcompile.counters().captures_recalled


@pytest.mark.parametrize("shared", [True, False])
def test_one_rank_captures(shared: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(recalls, folder, shared)
    for rank, (y, _, _) in enumerate(found):
        x = torch.full((8,), 0.25 * (rank + 1))
        torch.testing.assert_close(y, torch.tanh(torch.full((8,), 1.5)) * x)
    assert sorted(cold for _, cold, _ in found) == [0, 1], "one rank captures, the other recalls"
    assert all(both - cold == 1 for _, cold, both in found), "the second time both recall"
