"""Programs on a GPU and the CPU at once: copies between them are steps of the program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dcompile

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    dcompile.reset_counters()


@pytest.mark.row("N2")
def test_to_the_cpu_and_back() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        down = (x * 2).cpu() + 1
        return down, down.exp().to(x.device) * x

    x = torch.randn(64, 33, device="cuda")
    found = dcompile.compile(program, cache_dir=None)(x)
    for have, want in zip(found, program(x), strict=True):
        assert have.device == want.device
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    counted = dcompile.counters()
    assert (counted.graphs, counted.library_calls, counted.kernel_launches) == (1, 2, 3)
    assert not counted.fallbacks


@pytest.mark.row("N2")
def test_strides_pinned_memory_and_writes() -> None:
    def program(image: Tensor, pinned: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        moved = image.to("cuda")
        old = y.sum()
        y.copy_(pinned, non_blocking=True)
        return moved, old, y * 2

    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    pinned, y = torch.randn(7).pin_memory(), torch.randn(7, device="cuda")
    mine, theirs = y.clone(), y.clone()
    found = dcompile.compile(program, cache_dir=None)(image, pinned, mine)
    for have, want in zip((*found, mine), (*program(image, pinned, theirs), theirs), strict=True):
        assert (have.device, have.stride()) == (want.device, want.stride())
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.row("B8")
def test_constants_and_cpu_scalars() -> None:
    scale = torch.tensor(2.5)

    def program(x: Tensor) -> Tensor:
        return x * scale + torch.arange(6).to(x.device) + torch.tensor([1.0, 2, 3, 4, 5, 6]).to("cuda")

    x = torch.randn(6, device="cuda")
    torch.testing.assert_close(dcompile.compile(program, cache_dir=None)(x), program(x))
