"""Measured choices and memory taken over, on a real GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcompile
from dcompile.backend import backend
from dcompile.options import Options
from dcompile.runtime.autotune import CHOICE

pytestmark = pytest.mark.gpu

ROWS, WIDE = 8192, 1024


def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (WIDE,), w, b)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((ROWS, WIDE), (WIDE,), (WIDE,))
    return tuple(torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes)


def gradients(function: object, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    y = function(*given)  # type: ignore[operator]
    return (y, *torch.autograd.grad(y, given, torch.randn_like(y)))


def test_kernels_are_measured_once_and_compute_the_same(tmp_path: Path) -> None:
    given = inputs()
    wanted = gradients(norm, given)
    options = Options.from_env({"cache_dir": tmp_path, "autotune": True})
    for _ in range(2):
        torch.compiler.reset()
        dcompile.reset_counters()
        found = gradients(torch.compile(norm, backend=backend(options), dynamic=False), given)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    choices = [json.loads(path.read_text()) for path in tmp_path.glob(f"*/*/{CHOICE}")]
    assert choices
    assert all(entry["us"] > 0 for choice in choices for entry in choice["measured"] if len(choice["measured"]) > 1)


def test_a_gradient_takes_the_memory_of_the_logits() -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDE, device="cuda", requires_grad=True)
    w = torch.randn(WIDE, 4 * WIDE, device="cuda", requires_grad=True)
    ids = torch.randint(0, 4 * WIDE, (ROWS,), device="cuda")

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ w, ids)

    def step(function: object) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(x, w), (x, w))  # type: ignore[operator]

    compiled = torch.compile(loss, backend=backend(Options.from_env({"cache_dir": None})), dynamic=False)
    for _ in range(2):
        found = step(compiled)
    del found
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = step(compiled)
    torch.cuda.synchronize()
    logits_bytes = ROWS * 4 * WIDE * 4
    assert torch.cuda.max_memory_allocated() - before < 1.6 * logits_bytes
    for a, b in zip(found, step(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
