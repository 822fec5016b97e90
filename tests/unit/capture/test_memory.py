"""Captured graphs are remembered: what is recalled computes the same, and nothing is recalled for another program."""

from __future__ import annotations

import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcompile
from dcompile.capture.memory import recall
from dcompile.options import Options
from dcompile.pipeline import memory_for
from dcompile.pipeline.memory import ENTRY


class Net(nn.Module):
    """Layers with parameters, buffers that training writes, and a constant."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))) * self.scale)


def step(cache: Path, module: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], dcompile.Counters]:
    """One compiled training step as a new process would do it: results, gradients and buffers; and what was counted."""
    torch._dynamo.reset()
    dcompile.reset_counters()
    before = len(entries(cache))
    y = dcompile.compile(module, cache_dir=cache, **options)(x)
    if y.requires_grad:
        y.square().sum().backward()
    wait_for_entries(cache, before + 1 - dcompile.counters().captures_recalled)
    state = [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()]
    return [tensor.clone() for tensor in state], dcompile.counters()


def called(cache: Path, function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, dcompile.Counters]:
    torch._dynamo.reset()
    dcompile.reset_counters()
    found = dcompile.compile(function, cache_dir=cache, **options)(*inputs)
    return found, dcompile.counters()


def entries(cache: Path) -> list[Path]:
    return list(cache.glob(f"??/*/{ENTRY}"))


def wait_for_entries(cache: Path, count: int) -> None:
    """An entry is stored by the thread that builds its last program."""
    until = time.monotonic() + 20
    while len(entries(cache)) < count:
        assert time.monotonic() < until, "no entry was stored"
        time.sleep(0.01)


def small(x: Tensor) -> Tensor:
    return torch.tanh(x * 2) + 1


def recalled(cache: Path, x: Tensor, **options: Any) -> bool:
    """Whether ``small`` of such an input is recalled; it is afterwards."""
    before = len(entries(cache))
    _, counted = called(cache, small, x, **options)
    wait_for_entries(cache, before + 1 - counted.captures_recalled)
    return bool(counted.captures_recalled)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_a_recalled_step_computes_the_same_bits(tmp_path: Path) -> None:
    first, cold = step(tmp_path, Net(), X)
    second, warm = step(tmp_path, Net(), X)
    assert (cold.captures_recalled, warm.captures_recalled) == (0, 1)
    assert (cold.cache_misses, warm.cache_hits, warm.cache_misses) == (2, 2, 0)
    assert "lower" in cold.seconds
    assert "lower" not in warm.seconds
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_later_steps_of_a_recalled_program_train_like_eager(tmp_path: Path) -> None:
    step(tmp_path, Net(), X)
    ours, theirs = Net(), Net()
    torch._dynamo.reset()
    compiled = dcompile.compile(ours, cache_dir=tmp_path)
    for module, call in ((ours, compiled), (theirs, theirs)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            call(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_recalled_graph_can_be_retained(tmp_path: Path) -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin().exp().sum()

    x = torch.randn(4, requires_grad=True)
    called(tmp_path, f, x)[0].backward()
    wait_for_entries(tmp_path, 1)
    y, counted = called(tmp_path, f, x)
    assert counted.captures_recalled == 1
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(first, x.cos() * x.sin().exp())
    assert torch.equal(first, second)


def test_writes_and_aliases_of_recalled_programs(tmp_path: Path) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x.mul_(3)
        z = y + 1
        return x, x[1:], z, z.view(-1)

    for _ in range(2):
        a, b = torch.arange(6.0).view(3, 2), torch.ones(2, 2, requires_grad=True)
        (same, part, z, flat), counted = called(tmp_path, f, a, b)
        assert torch.equal(a, torch.arange(6.0).view(3, 2) * 3)
        assert same is a
        assert part.data_ptr() == a[1:].data_ptr()
        assert z.data_ptr() == flat.data_ptr()
        flat.sum().backward()
        wait_for_entries(tmp_path, 1)
        assert torch.equal(b.grad, torch.ones(2, 2))  # type: ignore[arg-type]
    assert counted.captures_recalled == 1


def test_nothing_flows_back_to_inputs_without_a_gradient(tmp_path: Path) -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x * 2 + y.detach()

    for _ in range(2):
        seen: list[Tensor] = []
        leaf = torch.ones(3, requires_grad=True)
        y = leaf * 3
        y.register_hook(seen.append)
        x = torch.ones(3, requires_grad=True)
        out, counted = called(tmp_path, f, x, y)
        out.sum().backward()
        wait_for_entries(tmp_path, 1)
        assert leaf.grad is None
        assert not seen
    assert counted.captures_recalled == 1


def inference(net: Net) -> Net:
    return net.eval()


def half_frozen(net: Net) -> Net:
    net.first.weight.requires_grad_(False)
    return net


def double(net: Net) -> Net:
    return net.double()


def other_constant(net: Net) -> Net:
    net.scale = 0.25
    return net


@pytest.mark.parametrize("change", [inference, half_frozen, double, other_constant])
def test_another_program_is_not_recalled(change: Callable[[Net], Net], tmp_path: Path) -> None:
    step(tmp_path, Net(), X)
    module, eager = change(Net()), change(Net())
    x = X.to(module.last.weight.dtype)
    found, counted = step(tmp_path, module, x)
    assert counted.captures_recalled == 0
    torch.testing.assert_close(found[0], eager(x).detach())


def test_other_sizes_strides_and_flags_are_not_recalled(tmp_path: Path) -> None:
    assert not recalled(tmp_path, X)
    for x in (X[:4], X.t().contiguous().t(), X.double()):
        assert not recalled(tmp_path, x), x.stride()
    assert recalled(tmp_path, X.clone())


@pytest.mark.parametrize("option", [{"skip": {"inline_pointwise"}}, {"eager_ops": {"tanh"}}, {"bucket_bytes": 1000}])
def test_other_options_are_not_recalled(option: dict[str, Any], tmp_path: Path) -> None:
    recalled(tmp_path, X)
    assert not recalled(tmp_path, X, **option)


def test_another_state_of_pytorch_is_not_recalled(tmp_path: Path) -> None:
    recalled(tmp_path, X)
    with torch.no_grad():
        assert not recalled(tmp_path, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recalled(tmp_path, X)
    torch.use_deterministic_algorithms(True)
    try:
        assert not recalled(tmp_path, X)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recalled(tmp_path, X)


def test_other_versions_are_not_recalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recalled(tmp_path, X)
    monkeypatch.setattr("dcompile.pipeline.memory.own_sources", lambda: "changed")
    assert not recalled(tmp_path, X)
    monkeypatch.undo()
    monkeypatch.setattr("platform.python_version", lambda: "9.9")
    assert not recalled(tmp_path, X)


@torch.library.custom_op("dcompile_test_memory::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: twice(x), "an operator that is not PyTorch's"),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)), "the operator cond on programs"),
    ],
)
def test_what_a_text_cannot_tell_is_refused_with_a_reason(
    function: Callable[..., Any], reason: str, tmp_path: Path
) -> None:
    for _ in range(2):
        found, counted = called(tmp_path, function, torch.arange(3.0))
        torch.testing.assert_close(found, function(torch.arange(3.0)))
        assert counted.captures_recalled == 0
        assert dict(counted.captures_refused) == {reason: 1}


def test_symbolic_sizes_are_refused(tmp_path: Path) -> None:
    x = torch.randn(6, 3)
    torch._dynamo.mark_dynamic(x, 0)
    _, counted = called(tmp_path, lambda x: x * 2, x)
    assert dict(counted.captures_refused) == {"sizes that are symbols": 1}


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    assert not recalled(tmp_path, X)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(RuntimeWarning, match="is corrupt"):
        found, counted = called(tmp_path, small, X)
    until = time.monotonic() + 20
    while not entry.exists() or entry.read_bytes() != whole:
        assert time.monotonic() < until, "it was not made again"
        time.sleep(0.01)
    assert counted.captures_recalled == 0
    torch.testing.assert_close(found, small(X))
    assert recalled(tmp_path, X)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps(3), pickle.dumps({"version": 0}), pickle.dumps({"version": 1})]
)
def test_an_entry_of_another_kind_is_of_no_use(content: bytes, tmp_path: Path) -> None:
    memory = memory_for(Options(cache_dir=tmp_path), lambda _: 1)
    assert memory is not None
    assert recall(content, memory, 0) is None


def test_programs_that_were_evicted_are_made_again(tmp_path: Path) -> None:
    assert not recalled(tmp_path, X)
    for host in list(tmp_path.glob("??/*/host.py")):
        shutil.rmtree(host.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found, counted = called(tmp_path, small, X)
    assert (counted.captures_recalled, counted.cache_misses) == (0, 1)
    torch.testing.assert_close(found, small(X))
    assert recalled(tmp_path, X)


def test_nothing_is_remembered_of_programs_that_are_watched_or_have_no_folder(tmp_path: Path) -> None:
    def users(_: Tensor) -> int:
        return 1

    assert memory_for(Options(cache_dir=None), users) is None
    assert memory_for(Options(cache_dir=tmp_path, dump_dir=tmp_path), users) is None
    assert memory_for(Options(cache_dir=tmp_path, show=frozenset({"ir"})), users) is None
    assert memory_for(Options(cache_dir=tmp_path), users) is not None
