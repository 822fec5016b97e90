"""What eager rejects although it can be traced is rejected, with the user's line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dcompile


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def _iadd(x: Tensor) -> Tensor:
    y = x.expand(4, 3)
    y += 1
    return y


REJECTED: dict[str, Callable[[Tensor], object]] = {
    "method": lambda x: x.expand(4, 3).add_(1),
    "operator": _iadd,
    "function": lambda x: torch.relu_(x.expand(4, 3)),
    "copy": lambda x: x.expand(4, 3).copy_(torch.ones(3)),
    "aminmax": lambda x: torch.aminmax(x, dim=1, out=(x.new_empty(1), torch.empty(1, dtype=torch.float64))),
    "complex": lambda x: torch.complex(x, x, out=torch.empty(1, 3, dtype=torch.complex128)),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_like_in_eager(name: str) -> None:
    with pytest.raises(RuntimeError):
        REJECTED[name](torch.randn(1, 3))
    ours, tracers = r"test_rejections\.py:\d+.*Instead: ", "single memory location"
    with pytest.raises(RuntimeError, match=f"{ours}|{tracers}"):
        torch.compile(REJECTED[name], backend="dcompile")(torch.randn(1, 3))


def test_rejected_with_symbolic_sizes() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        return x.expand(y.shape[0], 3).add_(1)

    with pytest.raises(RuntimeError):
        program(torch.randn(1, 3), torch.randn(5))
    with pytest.raises(RuntimeError, match="several elements share memory"):
        torch.compile(program, backend="dcompile", dynamic=True)(torch.randn(1, 3), torch.randn(5))


ACCEPTED: dict[str, Callable[[Tensor], object]] = {
    "one_element_a_place": lambda x: x.expand(1, 3).add_(1),
    "copy_of_it": lambda x: x.expand(4, 3).clone().add_(1),
    "metadata": lambda x: x.expand(4, 3).unsqueeze_(0) + 1,
    "out": lambda x: torch.aminmax(x, dim=1, out=(x.new_empty(1), x.new_empty(1))),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_like_in_eager(name: str) -> None:
    x = torch.randn(1, 3)
    want = ACCEPTED[name](x.clone())
    torch.testing.assert_close(dcompile.compile(ACCEPTED[name])(x.clone()), want)
