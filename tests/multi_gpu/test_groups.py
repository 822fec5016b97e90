"""Several groups at once on four ranks: rows and columns of a mesh, overlapping pairs, and sends and receives; compiled
equals eager on each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


def _programs(rank: int) -> dict[str, Callable[[Tensor], Any]]:
    import torch.distributed._functional_collectives as fc
    from torch.distributed.device_mesh import init_device_mesh

    ops, wait = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    rows, columns = mesh.get_group("row"), mesh.get_group("column")
    pairs = [dist.new_group(list(members)) for members in ((0, 3), (1, 2))]
    pair = pairs[0 if rank in (0, 3) else 1]
    world = dist.group.WORLD.group_name

    def in_flight_together(x: Tensor) -> Any:
        a = ops.all_reduce(x * 2, "sum", rows.group_name)
        b = ops.all_gather_into_tensor(x + 1, 2, columns.group_name)
        c = ops.reduce_scatter_tensor(x.sin(), "sum", 2, pair.group_name)
        d = ops.all_reduce(x, "max", world)
        work = torch.tanh(x @ x.t()) @ x
        return work + wait(d), wait(c) * 2, wait(b) - 1, wait(a) + work

    def mesh_dimensions(x: Tensor) -> Any:
        total = fc.all_reduce(x.cos(), "sum", (mesh, 0))
        everyone = fc.all_gather_tensor(total * x, 0, (mesh, 1))
        return fc.reduce_scatter_tensor(everyone.exp(), "sum", 0, (mesh, 1))

    def chained(x: Tensor) -> Tensor:
        for group in (rows, columns, pair):
            x = wait(ops.all_reduce(x * 0.5, "sum", group.group_name)).sin()
        return x

    return {"in_flight_together": in_flight_together, "mesh_dimensions": mesh_dimensions, "chained": chained}


def _run(rank: int) -> dict[str, tuple[Any, Any]]:
    import dcompile

    torch.manual_seed(rank)
    x = torch.randn(4, 4)
    found = {}
    for name, program in _programs(rank).items():
        torch.compiler.reset()
        compiled = dcompile.compile(program, cache_dir=tempfile.mkdtemp(), fullgraph=True, deadline_s=60.0)
        found[name] = (_plain(compiled(x.clone())), _plain(program(x.clone())))
    return found


def _plain(result: Any) -> list[Tensor]:
    """Results without the wrapper that eager functional collectives return."""
    results = result if isinstance(result, tuple) else (result,)
    return [torch.ops._c10d_functional.wait_tensor(one) * 1 for one in results]


def test_groups_meshes_and_pairs_at_once_give_eagers_results() -> None:
    for rank, found in enumerate(run_ranks(_run, world=4, deadline_s=150)):
        for name, (ours, eager) in found.items():
            torch.testing.assert_close(ours, eager, msg=lambda text, at=(rank, name): f"{at}: {text}")


def _to_the_neighbour(rank: int) -> tuple[Tensor, Tensor]:
    import dcompile

    def ring(x: Tensor) -> Tensor:
        sent, received = x * 2, torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, 1 - rank),
                dist.P2POp(dist.irecv, received, 1 - rank),
            ]
        )
        for work in works:
            work.wait()
        return received + x

    x = torch.arange(6.0) + 10 * rank
    expected = ring(x)
    return dcompile.compile(ring, cache_dir=tempfile.mkdtemp(), deadline_s=60.0)(x), expected


def test_sends_and_receives_give_eagers_results() -> None:
    for ours, eager in run_ranks(_to_the_neighbour, deadline_s=100):
        assert torch.equal(ours, eager)
        assert not torch.equal(eager, torch.zeros(6))
