"""Gradients of interpolation stay one op, and PyTorch's own table is as before after a compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dcompile
from dcompile.capture.interpolation import GRADIENTS, KEYS, whole_gradients


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path))


def both(function: Any, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compiled result, gradients of compiled and eager."""
    torch.compiler.reset()
    dcompile.reset_counters()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [torch.compile(function, backend="dcompile", **options)(leaves[0]), function(leaves[1])]
    torch.testing.assert_close(results[0], results[1])
    weights = torch.randn_like(results[1])
    for result in results:
        (result * weights).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    return results[0], leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize(
    ("mode", "shape", "how"),
    [
        ("linear", (2, 3, 9), {"scale_factor": 2.0}),
        ("bilinear", (2, 3, 5, 6), {"scale_factor": 2.0}),
        ("bilinear", (2, 3, 5, 6), {"size": (7, 11), "align_corners": True}),
        ("bilinear", (2, 3, 5, 6), {"scale_factor": (1.5, 3.0), "recompute_scale_factor": True}),
        ("trilinear", (1, 2, 3, 4, 3), {"scale_factor": 2.0}),
    ],
)
def test_the_gradient_is_gathered(mode: str, shape: tuple[int, ...], how: dict[str, Any], own_cache: None) -> None:
    _, ours, eagers = both(lambda x: F.interpolate(x * 2, mode=mode, **how), torch.randn(shape))
    torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)
    counted = dcompile.counters()
    assert not counted.fallbacks
    assert counted.library_calls == 0


def test_symbolic_sizes_keep_the_pieces(own_cache: None) -> None:
    x = torch.randn(2, 3, 5, 6)
    _, ours, eagers = both(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), x, dynamic=True)
    torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)


def test_pytorchs_table_is_restored() -> None:
    def kernels() -> dict[Any, Any]:
        return {op: {key: op.py_kernels.get(key) for key in KEYS} for op in GRADIENTS}

    before = kernels()
    with whole_gradients():
        assert all(kernels()[op] != before[op] for op in GRADIENTS)
    assert kernels() == before
