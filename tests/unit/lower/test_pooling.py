"""Pooling rules against eager: windows over the edge, padding, dilation, channels last, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.lower.harness import check

aten = torch.ops.aten

POOLS: dict[str, Callable[[Tensor], Any]] = {
    "average": lambda x: aten.avg_pool2d(x, [3, 2], [2, 2], [1, 0]),
    "average, ceil mode over the edge": lambda x: aten.avg_pool2d(x, [3, 3], [2, 2], [1, 1], True, False),
    "average, ceil mode, padding counts": lambda x: aten.avg_pool2d(x, [3, 3], [3, 3], [1, 1], True, True),
    "average, own divisor": lambda x: aten.avg_pool2d(x, [2, 2], [1, 1], [0, 0], False, True, 3),
    "maximum": lambda x: aten.max_pool2d_with_indices(x, [2, 3]),
    "maximum, dilated": lambda x: aten.max_pool2d_with_indices(x, [2, 2], [2, 1], [1, 1], [2, 2], True),
    "adaptive average": lambda x: aten._adaptive_avg_pool2d(x, [3, 4]),
    "adaptive maximum": lambda x: aten.adaptive_max_pool2d(x, [2, 5]),
    "adaptive average, larger": lambda x: aten._adaptive_avg_pool2d(x, [9, 11]),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pool(pool: str, memory_format: torch.memory_format) -> None:
    check(POOLS[pool], torch.randn(2, 3, 7, 8).to(memory_format=memory_format))


@pytest.mark.parametrize("pool", POOLS)
def test_gradient(pool: str) -> None:
    x = torch.randn(2, 3, 7, 8, requires_grad=True)

    def gradient(x: Tensor, weights: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = POOLS[pool](leaf)
            first = result[0] if isinstance(result, tuple) else result
            return torch.autograd.grad((first * weights).sum(), leaf)[0]

    result = POOLS[pool](x)
    shape = (result[0] if isinstance(result, tuple) else result).shape
    check(gradient, x.detach(), torch.randn(shape))


def test_a_window_of_nothing_but_minus_infinity_names_its_first_position() -> None:
    x = torch.full((1, 1, 4, 4), -torch.inf)
    check(lambda x: aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1]), x)


def test_three_dimensions_and_half_precision() -> None:
    x = torch.randn(1, 2, 5, 6, 4)
    check(lambda x: aten.avg_pool3d(x, [2, 3, 2], [2, 2, 1], [1, 1, 0], True), x)
    check(lambda x: aten.max_pool3d_with_indices(x, [2, 2, 2], [2, 1, 2], [1, 0, 1]), x)
    check(lambda x: aten.avg_pool2d(x, [3, 3]), torch.randn(2, 3, 9, 9).bfloat16(), rtol=1e-2, atol=1e-2)


def test_integers_and_symbolic_sizes() -> None:
    check(lambda x: aten.max_pool2d_with_indices(x, [2, 2]), torch.randint(-9, 9, (1, 2, 6, 6)))
    check(lambda x: aten.avg_pool2d(x, [3, 3], [2, 2], [1, 1], True, False), torch.randn(2, 3, 7, 8), symbolic=True)


def test_average_of_unbatched() -> None:
    check(lambda x: F.avg_pool2d(x, 2), torch.randn(3, 6, 6))
