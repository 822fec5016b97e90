"""Capture and data parallelism on two ranks. The captured graphs run with eager ops over gloo."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dcompile.capture import graph_breaks, reset_graph_breaks
from dcompile.errors import Divergence
from dcompile.parallel import data_parallel
from tests.multi_gpu.eager_backend import EagerBackend
from tests.multi_gpu.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.multi_rank


class Tied(nn.Module):
    """A small language model: an embedding tied to the output layer, one frozen layer, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens))
        return self.output(torch.tanh(self.hidden(self.frozen(x))) * self.scale)


def _loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.replace("_orig_mod.", "").replace("module.", ""): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def _data_parallel(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # different weights: the wrappers must make them equal
    model = Tied()
    plain, ours = DistributedDataParallel(copy.deepcopy(model)), data_parallel(copy.deepcopy(model))
    backend = EagerBackend()
    reset_graph_breaks()
    compiled = torch.compile(ours, backend=backend)
    tokens = torch.randint(0, 11, (3, 5))
    losses = [_loss(plain, tokens), _loss(compiled, tokens)]
    for loss in losses:
        loss.backward()
    eager = data_parallel(copy.deepcopy(model))
    _loss(eager, tokens).backward()
    expected, got, uncompiled = _gradients(plain), _gradients(ours), _gradients(eager)
    assert expected.keys() == got.keys() == uncompiled.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(uncompiled[name], gradient, rtol=1e-6, atol=1e-7)
    return {
        "losses": [loss.item() for loss in losses],
        "kinds": backend.kinds(),
        "breaks": graph_breaks(),
        "backward": backend.ops(1),
        "gradients": sorted(got),
        "keys": list(ours.state_dict()),
        "expected_keys": list(model.state_dict()),
        "weights": ours.state_dict(),
    }


def test_data_parallel_equals_eager_ddp() -> None:
    first, second = run_ranks(_data_parallel)
    for result in (first, second):
        assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
        assert result["kinds"] == ["forward", "backward"]
        assert result["breaks"] == 0
        assert result["keys"] == result["expected_keys"]
        launches = result["backward"].count("_c10d_functional.all_reduce.default")
        assert (
            launches == result["backward"].count("_c10d_functional.wait_tensor.default") == 5
        )  # tied once, frozen never
        assert result["gradients"] == ["embedding.weight", "hidden.bias", "hidden.weight", "norm.bias", "norm.weight"]
    assert first["backward"] == second["backward"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def _with_ddp(rank: int) -> dict[str, list[str]]:
    torch.manual_seed(0)
    model = Tied()
    torch.manual_seed(rank)
    tokens = torch.randint(0, 11, (3, 5))
    reference = DistributedDataParallel(copy.deepcopy(model))
    _loss(reference, tokens).backward()
    expected = _gradients(reference)
    kinds = {}
    for name in ("DDP of compiled", "compiled DDP", "data_parallel of compiled"):
        torch._dynamo.reset()
        backend = EagerBackend()
        wrapped: nn.Module = copy.deepcopy(model)
        if name == "DDP of compiled":
            wrapped = DistributedDataParallel(torch.compile(wrapped, backend=backend))
        elif name == "compiled DDP":
            wrapped = torch.compile(DistributedDataParallel(wrapped), backend=backend)
        else:
            wrapped = data_parallel(torch.compile(wrapped, backend=backend))
        _loss(wrapped, tokens).backward()
        torch.testing.assert_close(_gradients(wrapped), expected, rtol=1e-5, atol=1e-6)
        kinds[name] = backend.kinds()
    return kinds


def test_compiled_modules_inside_and_outside_of_wrappers() -> None:
    for kinds in run_ranks(_with_ddp):
        assert set(map(tuple, kinds.values())) == {("forward", "backward")}


def _accumulate(rank: int, compiled: bool) -> float:
    torch.manual_seed(0)
    model = Tied()
    torch.manual_seed(rank)
    batches = torch.randint(0, 11, (4, 3, 5))
    theirs, ours = DistributedDataParallel(copy.deepcopy(model)), data_parallel(copy.deepcopy(model))
    run: nn.Module = torch.compile(ours, backend=EagerBackend()) if compiled else ours
    largest = 0.0
    for wrapper, call in ((theirs, theirs), (ours, run)):
        with wrapper.no_sync():
            for batch in batches[:2]:
                _loss(call, batch).backward()
        local = {name: gradient.clone() for name, gradient in _gradients(wrapper).items()}
        for batch in batches[2:]:  # the first averages all that has accumulated
            _loss(call, batch).backward()
        largest = max(float((local[n] - g).abs().max()) for n, g in _gradients(wrapper).items())
    torch.testing.assert_close(_gradients(ours), _gradients(theirs), rtol=1e-5, atol=1e-6)
    return largest


def _accumulate_both(rank: int) -> list[float]:
    return [_accumulate(rank, compiled) for compiled in (False, True)]


def test_no_sync_accumulates_as_ddp_does() -> None:
    assert min(min(changes) for changes in run_ranks(_accumulate_both)) > 1e-3  # averaging changed something


def _different_modules(rank: int) -> str:
    with pytest.raises(Divergence) as caught:
        data_parallel(nn.Linear(4 + rank, 3))
    return str(caught.value)


def test_ranks_with_different_modules_are_told_so() -> None:
    for message in run_ranks(_different_modules):
        assert "rank 0 has weight (3, 4)" in message
        assert "rank 1 has weight (3, 5)" in message


def _unused_on_rank_1(rank: int) -> list[tuple[bool, list[list[str]]]]:
    """The result of the first all_reduce is used on rank 0 only; both must launch both, waited for or not."""
    group = dist.group.WORLD.group_name
    all_reduce, wait = torch.ops._c10d_functional.all_reduce, torch.ops._c10d_functional.wait_tensor

    def run(waited: bool, train: bool) -> list[list[str]]:
        def program(x: torch.Tensor) -> torch.Tensor:
            first = all_reduce(x.detach() * 2, "sum", group)
            if waited or rank == 0:
                first = wait(first)
            second = wait(all_reduce(x.detach() + 1, "sum", group))
            return (x * second + first).sin() if rank == 0 else (x * second).sin()

        torch._dynamo.reset()
        backend = EagerBackend()
        values = torch.arange(1.0, 5.0)
        x = values.clone().requires_grad_(train)
        y = torch.compile(program, backend=backend)(x)
        if train:
            y.sum().backward()
        total = values * 2 * (values + 1)
        torch.testing.assert_close(y.detach(), (total + 4 * values).sin() if rank == 0 else total.sin())
        return [backend.ops(index) for index in range(len(backend.graphs))]

    return [(train, run(waited, train)) for waited in (False, True) for train in (False, True)]


def test_collective_unused_on_one_rank_is_launched_there_too() -> None:
    for results in run_ranks(_unused_on_rank_1):
        for train, ops in results:
            assert len(ops) == 1 + train
            assert ops[0].count("_c10d_functional.all_reduce.default") == 2
            assert not train or "_c10d_functional.all_reduce.default" not in ops[1]


def _programs(rank: int) -> dict[str, list[str]]:
    """Collectives as users write them: compiled equals eager on results and on mutated inputs."""
    comm, group = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def in_place(x: torch.Tensor) -> Any:
        y = x * 2
        pending = comm.all_reduce_(y, "sum", group)
        z = x + 1
        return comm.wait_tensor(pending) + z, y

    def in_place_on_input(x: torch.Tensor) -> Any:
        comm.wait_tensor(comm.all_reduce_(x, "sum", group))
        comm.wait_tensor(comm.broadcast_(x[:2], 1, group))
        return x + 1

    def in_place_coalesced(x: torch.Tensor) -> Any:
        parts = [x * 2, x * 3]
        both = comm.all_reduce_coalesced_(parts, "sum", group)
        return comm.wait_tensor(both[0]) + comm.wait_tensor(parts[1]), parts[0]

    def plain_names(x: torch.Tensor) -> Any:
        gathered, scattered = x.new_empty(8), x.new_empty(2)
        dist.all_reduce(x)
        dist.all_gather_into_tensor(gathered, x)
        dist.reduce_scatter_tensor(scattered, gathered[:4] * 1)
        return gathered, scattered

    def wait_on_view(x: torch.Tensor) -> Any:
        result = comm.all_reduce(x, "sum", group)
        view = result.view(2, 2)
        comm.wait_tensor(view)
        return result + 1, view * 2

    def equal_launches(x: torch.Tensor) -> Any:
        first, second = comm.all_reduce(x, "sum", group), comm.all_reduce(x, "sum", group)
        return comm.wait_tensor(first) + comm.wait_tensor(second)

    found = {}
    for program in (in_place, in_place_on_input, in_place_coalesced, plain_names, wait_on_view, equal_launches):
        torch._dynamo.reset()
        reset_graph_breaks()
        backend = EagerBackend()
        x = torch.randn(4) + rank
        eager = x.clone()
        expected, got = program(eager), torch.compile(program, backend=backend)(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(x, eager)
        assert graph_breaks() == 0, program.__name__
        assert backend.kinds() == ["inference"], program.__name__
        found[program.__name__] = [op.split(".")[1] for op in backend.ops(0) if op.startswith("_c10d_functional")]
    return found


def test_collectives_as_users_write_them() -> None:
    for found in run_ranks(_programs):
        wait = "wait_tensor"
        assert found == {
            "in_place": ["all_reduce", wait],
            "in_place_on_input": ["all_reduce", wait, "broadcast", wait],
            "in_place_coalesced": ["all_reduce_coalesced", wait, wait],
            "plain_names": ["all_reduce", wait, "all_gather_into_tensor", wait, "reduce_scatter_tensor", wait],
            "wait_on_view": ["all_reduce", wait],
            "equal_launches": ["all_reduce", "all_reduce", wait, wait],
        }


def _fails_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("what went wrong here")
    dist.barrier()


def test_a_failing_rank_ends_the_run_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match="what went wrong here"):
        run_ranks(_fails_on_rank_1, deadline_s=30)


def _hangs_on_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(1000)


def test_a_hanging_rank_is_killed_at_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(_hangs_on_rank_0, deadline_s=8)
    assert time.monotonic() - start < 30
