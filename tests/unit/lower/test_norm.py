from __future__ import annotations

import pytest
import torch

from tests.unit.lower.harness import check

aten = torch.ops.aten
DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(affine: bool, dtype: torch.dtype) -> None:
    x, w, b = randn(3, 4, 16, dtype=dtype), randn(16, dtype=dtype, seed=1), randn(16, dtype=dtype, seed=2)
    given = (w, b) if affine else (None, None)
    check(lambda x, w, b: aten.native_layer_norm(x, (16,), w, b, 1e-5)[0], x, *given)


@pytest.mark.parametrize("shape", [(16,), (4, 16)])
def test_layer_norm_gradients(shape: tuple[int, ...]) -> None:
    x, g, w, b = randn(3, 4, 16), randn(3, 4, 16, seed=1), randn(*shape, seed=2), randn(*shape, seed=3)
    _, mean, rstd = aten.native_layer_norm(x, shape, w, b, 1e-5)
    check(
        lambda g, x, m, r, w, b: aten.native_layer_norm_backward(g, x, shape, m, r, w, b, [True, True, True]),
        g, x, mean, rstd, w, b, rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm(dtype: torch.dtype) -> None:
    x, w, b = randn(2, 6, 3, 5, dtype=dtype), randn(6, dtype=dtype, seed=1), randn(6, dtype=dtype, seed=2)
    check(lambda x, w, b: aten.native_group_norm(x, w, b, 2, 6, 15, 3, 1e-5), x, w, b)
    check(lambda x: aten.native_group_norm(x, None, None, 2, 6, 15, 2, 1e-5)[0], x)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_running_statistics(training: bool) -> None:
    x, w, b = randn(4, 3, 5, 2), randn(3, seed=1), randn(3, seed=2)
    mean, var = randn(3, seed=3), randn(3, seed=4).abs() + 0.5

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, saved, rstd, running_mean, running_var = aten._native_batch_norm_legit_functional(
            *args, training, 0.1, 1e-5
        )
        return (out, saved, rstd, running_mean, running_var) if training else (out, running_mean, running_var)

    check(function, x, w, b, mean, var)


def test_batch_norm_without_running_statistics() -> None:
    x, w, b = randn(4, 3, 5), randn(3, seed=1), randn(3, seed=2)
    check(lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5), x, w, b)


def test_batch_norm_at_inference() -> None:
    x, w, b, m, v = randn(4, 3, 5), randn(3, seed=1), randn(3, seed=2), randn(3, seed=3), randn(3, seed=4).abs()
    check(lambda *a: aten._native_batch_norm_legit_no_training(*a, 0.1, 1e-5)[0], x, w, b, m, v)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_gradients(training: bool) -> None:
    x, g, w, m = randn(4, 3, 5, 2), randn(4, 3, 5, 2, seed=1), randn(3, seed=2), randn(3, seed=3)
    v = randn(3, seed=4).abs() + 0.5
    _, saved, rstd, _, _ = aten._native_batch_norm_legit_functional(x, w, w, m, v, True, 0.1, 1e-5)
    check(
        lambda *a: aten.native_batch_norm_backward(*a, training, 1e-5, [True, True, True]),
        g, x, w, m, v, saved, rstd, rtol=1e-4, atol=1e-5,
    )  # fmt: skip
