"""Gradients of linear interpolation against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.lower.upsample import Stretch
from tests.unit.lower.harness import check

aten = torch.ops.aten

PLANE = {
    "twice": ((8, 14), (4, 7), False, 2.0, 2.0),
    "twice, corners on corners": ((8, 14), (4, 7), True, None, None),
    "larger by odd ratios": ((9, 10), (4, 7), False, None, None),
    "scale of its own": ((6, 10), (4, 7), False, 1.6, 1.5),
    "smaller": ((3, 2), (7, 9), False, None, None),
    "smaller, corners on corners": ((3, 2), (7, 9), True, None, None),
    "one position": ((5, 4), (1, 1), False, None, None),
    "to one position": ((1, 1), (5, 4), True, None, None),
    "the same size": ((4, 7), (4, 7), False, None, None),
}


@pytest.mark.parametrize("case", PLANE)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_dimensions(case: str, memory_format: torch.memory_format) -> None:
    count, size, corners, *scales = PLANE[case]
    grad = torch.randn(2, 3, *count).to(memory_format=memory_format)

    def gradient(g: torch.Tensor) -> Any:
        return aten.upsample_bilinear2d_backward(g, list(count), [2, 3, *size], corners, *scales)

    check(gradient, grad, rtol=1e-4, atol=1e-5)


def test_one_and_three_dimensions_and_other_types() -> None:
    line, cube = torch.randn(2, 3, 11), torch.randn(1, 2, 6, 5, 8)
    check(lambda g: aten.upsample_linear1d_backward(g, [11], [2, 3, 4], False), line, rtol=1e-4, atol=1e-5)
    check(lambda g: aten.upsample_trilinear3d_backward(g, [6, 5, 8], [1, 2, 3, 5, 4], True), cube, rtol=1e-4, atol=1e-5)
    wide = torch.randn(1, 2, 8, 6, dtype=torch.float64)
    check(lambda g: aten.upsample_bilinear2d_backward(g, [8, 6], [1, 2, 4, 3], False), wide)
    narrow = torch.randn(1, 2, 8, 6).bfloat16()
    check(lambda g: aten.upsample_bilinear2d_backward(g, [8, 6], [1, 2, 4, 3], False), narrow, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 31, 100])
@pytest.mark.parametrize("corners", [False, True])
def test_windows_hold_every_output_with_a_weight(size: int, count: int, corners: bool) -> None:
    stretch = Stretch.of(size, count, corners, None)
    first, length = stretch.window()
    ratio = stretch.ratio
    for i in range(size):
        base = i * ratio.numerator // ratio.denominator + first
        for o in range(count):
            at = min(max(o * stretch.step + stretch.shift, 0.0), size - 1)
            assert abs(at - i) >= 1 - 1e-9 or base <= o < base + length


def test_windows_of_a_doubling_hold_four_outputs() -> None:
    assert Stretch.of(48, 96, False, 2.0).window()[1] == 4


def test_windows_are_known_while_tensors_are_fake() -> None:
    with FakeTensorMode():
        assert Stretch.of(48, 96, False, 2.0).window()[1] == 4
