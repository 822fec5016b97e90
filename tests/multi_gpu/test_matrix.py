"""The matrix of ``matrix_cells``: every way to spread a model trains like eager PyTorch spread in the same way.

A run of the whole suite takes the spread selection. All cells of this machine, with a table and JUnit XML:

    python -m pytest tests/multi_gpu/test_matrix.py --matrix full -n 2 --dist loadgroup --junitxml matrix.xml
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.multi_gpu.crew import Crew
from tests.multi_gpu.matrix_cells import DTYPES, Cell, all_cells, backends, spread_cells
from tests.multi_gpu.ranks import RankFailed

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]

WIDTH, STEPS = 16, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, WIDTH), Block(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))  # type: ignore[no-any-return]


def spread(cell: Cell, model: Model, device: str) -> nn.Module:
    """``model`` spread over the ranks of the process group."""
    ranks = cell.ranks
    if cell.way == "torch-ddp":
        return DistributedDataParallel(model)
    if cell.way == "ddp":
        import dcompile

        return dcompile.data_parallel(model)
    data = None
    if cell.way.startswith("tp"):
        shape, names = ((ranks,), ("tensor",)) if cell.way == "tp" else ((2, ranks // 2), ("data", "tensor"))
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        tensor = mesh["tensor"] if len(names) > 1 else mesh
        parallelize_module(model.block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if cell.way == "tp":
            return model
        data = mesh["data"]
    elif cell.way == "hsdp":
        data = init_device_mesh(device, (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.block, mesh=data)
    return fully_shard(model, mesh=data)  # type: ignore[return-value]


def data_rank(cell: Cell, rank: int) -> int:
    """Ranks that hold parts of the same layer see the same data."""
    if cell.way == "tp":
        return 0
    return rank // (cell.ranks // 2) if cell.way == "tp+fsdp" else rank


def train(cell: Cell, rank: int, compiled: bool, cache: str) -> list[float]:
    import dcompile

    torch.compiler.reset()
    torch.manual_seed(0)
    device = "cuda" if cell.backend == "nccl" else "cpu"
    model = Model().to(device, DTYPES[cell.dtype])
    run = spread(cell, model, device)
    if compiled:
        skip = () if cell.overlap == "overlap" else ("overlap",)
        run = dcompile.compile(run, dynamic=cell.shapes == "dynamic", cache_dir=cache, skip=skip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + data_rank(cell, rank))
        rows = 6 + 2 * step if cell.shapes == "dynamic" else 6
        x = torch.randn(rows, 8, generator=generator).to(device, DTYPES[cell.dtype])
        loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def both(rank: int, cell: Cell) -> dict[str, Any]:
    """Losses, eager and compiled, and what compiling did."""
    import dcompile

    eager = train(cell, rank, compiled=False, cache="")
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared)
    for _ in range(1 if cell.cache == "cold" else 2):
        dcompile.reset_counters()
        compiled = train(cell, rank, compiled=True, cache=shared[0])
        dist.barrier()
    counted = dcompile.counters()
    facts = {"graphs": counted.graphs, "breaks": counted.graph_breaks, "collectives": counted.collectives}
    facts |= {"hits": counted.cache_hits, "misses": counted.cache_misses, "fallbacks": dict(counted.fallbacks)}
    return {"eager": eager, "compiled": compiled, **facts}


@pytest.fixture(scope="module")
def crews() -> Iterator[Callable[[int, str], Crew]]:
    """The crew for so many ranks on a backend, at most one at a time: the others' memory is better used."""
    found: dict[tuple[int, str], Crew] = {}

    def crew(world: int, backend: str) -> Crew:
        for key in [key for key in found if key != (world, backend)]:
            found.pop(key).close()
        return found.setdefault((world, backend), Crew(world, backend))

    yield crew
    for each in found.values():
        each.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = sorted(all_cells() if metafunc.config.getoption("--matrix") == "full" else spread_cells())
        marked = [pytest.param(c, id=c.name, marks=pytest.mark.xdist_group(f"{c.ranks}-{c.backend}")) for c in cells]
        metafunc.parametrize("cell", marked)


def test_cell(cell: Cell, crews: Callable[[int, str], Crew], record_property: Callable[[str, object], None]) -> None:
    record_property("cell", cell.name)
    ranks = crews(cell.ranks, cell.backend).run(both, cell, deadline_s=200)
    tolerance = 1e-5 if cell.dtype == "f32" else 2e-2
    for found in ranks:
        assert found["compiled"] == pytest.approx(found["eager"], rel=tolerance)
        assert found["eager"][0] != found["eager"][-1]
        assert not [op for op in found["fallbacks"] if "op by op" in op]
        if cell.cache == "warm":
            assert found["misses"] == 0
            assert found["hits"] == found["graphs"]
    if cell.ranks > 1:  # alone, a sharded model may still gather from itself
        assert all(found["collectives"] > 0 for found in ranks)
    facts = ranks[0]
    record_property("found", f"{facts['graphs']} graphs, {facts['breaks']} breaks, {facts['collectives']} collectives")


def fails_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise ValueError("the case breaks here")
    return rank


def process_of(rank: int) -> int:
    import os

    return os.getpid()


def test_a_case_that_breaks_does_not_touch_the_next() -> None:
    crew = Crew(2)
    try:
        first = crew.run(process_of)
        assert crew.run(process_of) == first, "ranks stay"
        with pytest.raises(RankFailed, match="the case breaks here"):
            crew.run(fails_on_rank_1, deadline_s=60)
        after = crew.run(process_of)
        assert not set(after) & set(first)
        assert crew.starts == 2
    finally:
        crew.close()


def test_the_spread_selection_meets_every_value() -> None:
    cells = spread_cells()
    for backend in backends():
        mine = [cell for cell in cells if cell.backend == backend]
        for axis, values in (("dtype", DTYPES), ("shapes", ("static", "dynamic")), ("cache", ("cold", "warm"))):
            assert {getattr(cell, axis) for cell in mine} == set(values)
    assert set(cells) <= set(all_cells())
    assert len({(c.ranks, c.backend, c.way) for c in cells}) == len({(c.ranks, c.backend, c.way) for c in all_cells()})
