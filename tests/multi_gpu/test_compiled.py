"""Two ranks through the whole compiler: training, collectives in the user's own program, and ranks that disagree."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.multi_gpu.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.multi_rank


def _compile(function: Any, **options: Any) -> Any:
    import dcompile

    return dcompile.compile(function, cache_dir=tempfile.mkdtemp(), **options)


class Model(nn.Module):
    """A small residual network whose gradients come in several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(self.norm(x)))
        return F.cross_entropy(self.head(x), y)


def _batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(16, 24, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def _train(model: nn.Module, parameters: Any, rank: int, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(*_batch(rank, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _wrapped(kind: str, model: nn.Module) -> nn.Module:
    import dcompile

    if kind == "eager":
        return DistributedDataParallel(model)
    if kind == "around":
        return DistributedDataParallel(_compile(model))
    if kind == "inside":
        return _compile(DistributedDataParallel(model))  # type: ignore[no-any-return]
    bucket_bytes = {"in graph": None, "in graph, one each": 1, "in graph, one bucket": 2**30}[kind]
    return _compile(dcompile.data_parallel(model), bucket_bytes=bucket_bytes)  # type: ignore[no-any-return]


def _all_wrappers(rank: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    import dcompile

    found: dict[str, Any] = {}
    for kind in kinds:
        torch.manual_seed(0)
        torch.compiler.reset()
        dcompile.reset_counters()
        model = Model()
        losses = _train(_wrapped(kind, model), model.parameters(), rank)
        counted = dcompile.counters()
        state = [p.detach().clone() for p in model.parameters()]
        found[kind] = (losses, state, counted.graphs, counted.graph_breaks, counted.collectives)
    return found


def test_every_way_of_data_parallel_trains_like_eager_ddp() -> None:
    kinds = ("eager", "around", "inside", "in graph", "in graph, one each", "in graph, one bucket")
    for found in run_ranks(_all_wrappers, kinds, deadline_s=240):
        losses, state, *_ = found["eager"]
        for kind in kinds[1:]:
            assert found[kind][0] == pytest.approx(losses, rel=1e-5), kind
            for mine, theirs in zip(found[kind][1], state, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for kind in kinds[3:]:
            assert found[kind][2:4] == (2, 0), "one forward and one backward graph, no graph break"
        assert found["in graph, one each"][4] == 12
        assert found["in graph, one bucket"][4] == 1


def _collectives(x: Tensor, group: str, root: int) -> tuple[Tensor, ...]:
    ops = torch.ops._c10d_functional
    wait = ops.wait_tensor
    total = wait(ops.all_reduce(x * 2, "sum", group))
    largest = wait(ops.all_reduce(x.sin(), "max", group))
    mean = wait(ops.all_reduce(x + 1, "avg", group))
    gathered = wait(ops.all_gather_into_tensor(x.t().contiguous(), 2, group))
    scattered = wait(ops.reduce_scatter_tensor(x.exp(), "sum", 2, group))
    sent = wait(ops.broadcast(x - 3, root, group))
    several = [wait(t) for t in ops.all_reduce_coalesced([x[0], x[:, 1] * 3], "sum", group)]
    more = [wait(t) for t in ops.all_gather_into_tensor_coalesced([x, x[:2] + 1], 2, group)]
    halves = [wait(t) for t in ops.reduce_scatter_tensor_coalesced([x, x + 5], "sum", 2, group)]
    return (total.tanh(), largest, mean * 2, gathered, scattered, sent, *several, *more, *halves)


def _each_collective(rank: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    group = dist.group.WORLD.group_name
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).to(dtype)
    expected = _collectives(x.clone(), group, 1)
    found = _compile(_collectives)(x.clone(), group, 1)
    return list(zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.row("S10", "S11")
def test_every_collective_gives_eagers_result_on_each_rank(dtype: torch.dtype) -> None:
    for pairs in run_ranks(_each_collective, dtype, deadline_s=120):
        for found, expected in pairs:
            assert found.dtype is expected.dtype
            tolerance = 1e-6 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _update_in_place(rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
    import dcompile

    ops, group = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def step(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        before = x * 2
        ops.wait_tensor(ops.all_reduce_(x, "sum", group))
        ops.wait_tensor(ops.broadcast_(y, 0, group))
        product = w @ w
        return before + product, x + y

    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(8, 8, generator=generator) for _ in range(3)]

    mine, theirs = inputs(), inputs()
    found = _compile(step)(*mine)
    expected = step(*theirs)
    launched = dcompile.counters().collectives
    return torch.cat([*found, *mine]), torch.cat([*expected, *theirs]), mine[0], launched


def test_collectives_written_in_place_update_their_tensors() -> None:
    results = run_ranks(_update_in_place, deadline_s=120)
    for found, expected, _, launched in results:
        torch.testing.assert_close(found, expected)
        assert launched == 2
    assert torch.equal(results[0][2], results[1][2])


def _unused_on_one_rank(rank: int) -> Tensor:
    ops, group = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def program(x: Tensor) -> Tensor:
        total = ops.wait_tensor(ops.all_reduce(x + 1, "sum", group))
        last = ops.wait_tensor(ops.all_reduce(x * 3, "sum", group))
        return last + total if rank == 0 else last * 1

    return _compile(program, deadline_s=60.0)(torch.ones(5) * (rank + 1))  # type: ignore[no-any-return]


def test_a_collective_one_rank_does_not_use_is_launched_there_all_the_same() -> None:
    first, second = run_ranks(_unused_on_one_rank, deadline_s=120)
    assert torch.equal(first, torch.full((5,), 14.0))
    assert torch.equal(second, torch.full((5,), 9.0))


def _different_programs(rank: int) -> str:
    from dcompile.errors import Divergence

    ops, group = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def program(x: Tensor) -> Tensor:
        x = ops.wait_tensor(ops.all_reduce(x.exp(), "sum", group))
        if rank == 1:
            x = ops.wait_tensor(ops.all_reduce(x.sin(), "max", group))
        return x

    with pytest.raises(Divergence) as caught:
        _compile(program, deadline_s=60.0)(torch.randn(6))
    return str(caught.value)


def test_ranks_with_different_collectives_are_told_which_and_do_not_hang() -> None:
    for message in run_ranks(_different_programs, deadline_s=90):
        assert "rank 0" in message
        assert "rank 1" in message
        assert "all_reduce.max" in message
        assert "test_compiled.py" in message


def _late(rank: int) -> str:
    from dcompile.errors import DeadlineExceeded

    group = dist.group.WORLD.group_name

    def program(x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.exp(), "sum", group))  # type: ignore[no-any-return]

    if rank == 1:
        return ""
    with pytest.raises(DeadlineExceeded) as caught:
        _compile(program, deadline_s=3.0)(torch.randn(6))
    return str(caught.value)


def test_a_rank_that_never_comes_is_named() -> None:
    message = run_ranks(_late, deadline_s=90)[0]
    assert "rank 1" in message
    assert "3 s" in message


def _unknown_group(rank: int) -> None:
    def program(x: Tensor) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.exp(), "sum", "nobody"))  # type: ignore[no-any-return]

    _compile(program)(torch.randn(6))


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(RankFailed, match="process group 'nobody'"):
        run_ranks(_unknown_group, deadline_s=60)


def _overlap_or_not(rank: int, skip: tuple[str, ...]) -> list[Tensor]:
    import dcompile

    torch.manual_seed(0)
    model = Model()
    compiled = _compile(dcompile.data_parallel(model), skip=skip)
    _train(compiled, model.parameters(), rank, steps=2)
    return [copy.deepcopy(p.detach()) for p in model.parameters()]


def test_skipping_overlap_changes_no_number() -> None:
    with_overlap = run_ranks(_overlap_or_not, (), deadline_s=120)
    without = run_ranks(_overlap_or_not, ("overlap",), deadline_s=120)
    for mine, theirs in zip(with_overlap[0], without[0], strict=True):
        assert torch.equal(mine, theirs)
