"""The whole compiler on small programs: numbers, dtypes, shapes, strides and gradients as in eager PyTorch."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcompile
from dcompile.errors import DCompileError


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch.manual_seed(0)
    dcompile.reset_counters()


def check(function: Callable[..., Any], *args: Any, tolerance: float = 1e-5) -> None:
    """Compiled equals eager: outputs with their strides, and what is left in the arguments."""
    mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
    expected = function(*theirs)
    found = torch.compile(function, backend="dcompile")(*mine)
    pairs = zip(_tensors((expected, theirs)), _tensors((found, mine)), strict=True)
    for want, have in pairs:
        assert have.dtype is want.dtype
        assert have.shape == want.shape
        assert have.stride() == want.stride()
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree.detach()]
    if isinstance(tree, tuple | list):
        return [t for item in tree for t in _tensors(item)]
    return []


def check_training(model: nn.Module, *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """One step's loss and all gradients equal eager's."""
    twin = copy.deepcopy(model)
    expected = twin(*inputs).float().square().mean()
    expected.backward()
    found = torch.compile(model, backend="dcompile")(*inputs).float().square().mean()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None and mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance, msg=name)


def test_a_chain_of_pointwise_ops_is_one_kernel() -> None:
    check(lambda x, y: torch.tanh(x * y + 2).exp().clamp(0.1, 2).sqrt(), torch.randn(33, 17), torch.randn(17))
    counted = dcompile.counters()
    assert (counted.graphs, counted.kernel_launches, counted.library_calls) == (1, 1, 0)


def test_softmax_is_one_kernel() -> None:
    check(lambda x: torch.softmax(x, -1), torch.randn(32, 100))
    assert dcompile.counters().kernel_launches == 1


@pytest.mark.parametrize(
    ("kind", "dim"),
    [(kind, dim) for kind in ("sum", "mean", "amax", "var") for dim in (0, 1, 2, (0, 2), (0, 1, 2))]
    + [("prod", dim) for dim in (0, 1, 2)],  # torch.prod takes one dimension
)
def test_reductions_over_any_dimension(kind: str, dim: Any) -> None:
    check(lambda x: getattr(torch, kind)(x, dim), torch.randn(5, 7, 9))


def test_views_of_inputs_and_strided_outputs() -> None:
    check(lambda x: (x.t(), x[1:, ::2], (x + 1).t(), x.reshape(-1)[3:]), torch.randn(6, 8))


def test_an_input_is_updated_in_place() -> None:
    def update(p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        m.mul_(0.9).add_(g)
        p.sub_(m, alpha=0.1)
        return p.sum()

    check(update, torch.randn(40), torch.randn(40), torch.randn(40))


def test_a_transposed_self_copy() -> None:
    def transpose(x: Tensor) -> Tensor:
        x.copy_(x.t() + 1)
        return x * 2

    check(transpose, torch.randn(7, 7))


def test_integers_and_booleans() -> None:
    a, b = torch.randint(-9, 9, (50,)), torch.randint(1, 9, (50,))
    check(lambda a, b: (a // b, a % b, a & b, (a > b).sum(), a.to(torch.uint8), a.float() / b), a, b)


def test_nan_and_infinity_travel_as_in_eager() -> None:
    x = torch.tensor([[1.0, float("nan"), float("inf")], [-float("inf"), -0.0, 3.0]])
    check(lambda x: (x.amax(1), x.softmax(1), x.exp(), x.relu(), x.sum(), torch.maximum(x, -x), x.argmax(1)), x)


def test_gather_scatter_and_out_of_range() -> None:
    table, index = torch.randn(10, 4), torch.randint(-10, 10, (6,))
    check(lambda t, i: t[i] * 2, table, index)
    bad = torch.tensor([3, 10])
    with pytest.raises(IndexError, match="out of range"):
        torch.compile(lambda t, i: t[i] * 2, backend="dcompile")(table, bad)


class GptBlock(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class LlamaBlock(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 80, bias=False), nn.Linear(width, 80, bias=False)
        self.down = nn.Linear(80, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.outer(torch.arange(x.shape[-2]), 1 / 100.0 ** (torch.arange(half) / half))
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        q, k = self.rotate(q), self.rotate(k)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("block", [GptBlock, LlamaBlock])
def test_a_transformer_block_trains_as_in_eager(block: type[nn.Module]) -> None:
    check_training(nn.Sequential(block(), block()), torch.randn(2, 16, 32))
    counted = dcompile.counters()
    assert counted.graph_breaks == 0
    assert counted.graphs == 2
    assert not counted.fallbacks


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(50, 32), GptBlock(), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.block(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=3)


def test_a_language_model_with_tied_embeddings_and_cross_entropy() -> None:
    check_training(Language(), torch.randint(0, 50, (2, 16)), torch.randint(0, 50, (2, 16)))
    assert not dcompile.counters().fallbacks


def test_bfloat16_stays_as_near_to_float64_as_eager() -> None:
    model = nn.Sequential(GptBlock(), GptBlock())
    x = torch.randn(2, 16, 32)
    exact = copy.deepcopy(model).double()(x.double())
    low, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    eager_error = (low(x).double() - exact).norm()
    error = (torch.compile(low, backend="dcompile")(x).double() - exact).norm()
    assert error <= 1.5 * eager_error


def test_dropout_is_reproducible_and_masks_forward_and_backward_alike() -> None:
    def run(x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True) * 2

    compiled = torch.compile(run, backend="dcompile")
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        x = torch.ones(1000, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y.detach())
        results.append(y.detach())
    assert torch.equal(*results)
    kept = (results[0] != 0).float().mean()
    assert 0.65 < kept < 0.75
    assert not torch.equal(results[0], compiled(torch.ones(1000)))


def test_sizes_may_change_between_calls() -> None:
    compiled = torch.compile(lambda x: (x * 2).softmax(-1).sum(0), backend="dcompile", dynamic=True)
    for rows, columns in ((5, 7), (64, 33), (1024, 16)):
        x = torch.randn(rows, columns)
        torch.testing.assert_close(compiled(x), (x * 2).softmax(-1).sum(0))
    assert dcompile.counters().graphs == 1


def test_empty_tensors() -> None:
    check(lambda x: ((x + 1).sum(0), x.exp(), x.sum()), torch.empty(0, 5))


def test_the_second_compile_of_the_same_program_comes_from_the_cache() -> None:
    x = torch.randn(8, 8)

    def program(x: Tensor) -> Tensor:
        return x.exp() + 1

    first = torch.compile(program, backend="dcompile")(x)
    torch.compiler.reset()
    second = torch.compile(program, backend="dcompile")(x)
    assert torch.equal(first, second)
    counted = dcompile.counters()
    assert (counted.cache_misses, counted.cache_hits) == (1, 1)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(DCompileError, match="bucket_byte"):
        dcompile.compile(lambda x: x, bucket_byte=1)


def test_an_eager_op_stays_a_library_call() -> None:
    compiled = dcompile.compile(lambda x: x.exp() * 2, eager_ops={"exp"})
    x = torch.randn(9)
    torch.testing.assert_close(compiled(x), x.exp() * 2)
    assert dcompile.counters().library_calls == 1
    assert not dcompile.counters().fallbacks


def test_explain_names_kernels_lines_and_fallbacks() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.histc(x.exp(), 30).sin()

    told = dcompile.explain(program, torch.randn(30))
    text = str(told)
    assert told.fallbacks["aten.histc.default"] == 1
    assert "test_backend.py" in text
    assert "predicted" in text
    assert "fallbacks: aten.histc.default x1" in text
    torch.testing.assert_close(told.result.shape, torch.Size([30]))


def test_explain_shows_the_backward_graph_and_leaves_gradients_alone() -> None:
    model = nn.Linear(4, 3)
    told = dcompile.explain(model, torch.randn(2, 4))
    assert [graph.name.rstrip("0123456789") for graph in told.graphs] == ["forward", "backward"]
    assert model.weight.grad is None
    told.result.sum().backward()
    assert model.weight.grad is not None


def test_explain_does_not_go_silent_when_called_often() -> None:
    def program(x: Tensor) -> Tensor:
        return x.exp() + 1

    for _ in range(12):
        assert len(dcompile.explain(program, torch.randn(3)).graphs) == 1


def test_explain_names_graphs_that_run_op_by_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match="op by op"):
        told = dcompile.explain(lambda x: x + 1, torch.randn(3))
    assert "op by op through the library, because no C++ compiler" in str(told)
    assert sum(told.fallbacks.values()) == 1


def test_a_forked_child_compiles_on_its_own() -> None:
    x = torch.randn(8)
    torch.compile(lambda x: x * 2, backend="dcompile")(x)
    child = os.fork()
    if child == 0:
        found = torch.compile(lambda x: x.exp() - 3, backend="dcompile")(x)
        os._exit(0 if torch.allclose(found, x.exp() - 3) else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)
