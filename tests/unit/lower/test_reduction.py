import itertools
import math

import pytest
import torch

from tests.unit.lower.harness import check

SUBSETS = [dims for n in (1, 2, 3) for dims in itertools.combinations((0, 1, 2), n)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dims", SUBSETS)
def test_reductions_over_every_subset(dims: tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for keep in (False, True):
            found += [x.sum(dims, keep), x.mean(dims, keep), x.amax(dims, keep), x.amin(dims, keep)]
            found += [x.var(dims, keepdim=keep), x.std(dims, correction=0, keepdim=keep)]
            found += [torch.logsumexp(x, dims, keep), torch.linalg.vector_norm(x, 2, dims, keep)]
            found += [torch.any(x > 2, dims, keep), torch.all(x > -2, dims, keep)]
            found += list(torch.var_mean(x, dims, keepdim=keep))
        return found

    check(function, randn(3, 4, 5), rtol=1e-5, atol=1e-6)


def test_full_reductions() -> None:
    check(
        lambda x: (x.sum(), x.mean(), x.prod(), x.max(), x.min(), x.argmax(), x.argmin(), x.amax(), x.any()),
        randn(3, 5), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("keep", [False, True])
def test_extremes_and_places(keep: bool) -> None:
    x = randn(4, 6)
    check(lambda v: (*v.max(1, keep), *v.min(0, keep), v.argmax(1, keep), v.argmin(-2, keep), v.prod(1, keep)), x)


@pytest.mark.parametrize("values", [[1, math.nan, 5, math.nan], [1, 5, 5, 2], [math.inf, math.inf, -math.inf, 0]])
def test_ties_and_nan(values: list[float]) -> None:
    check(lambda v: (v.argmax(), v.argmin(), v.max(), v.min(), v.amax(0), *v.max(0), *v.min(0)), torch.tensor(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_are_accumulated_wide(dtype: torch.dtype) -> None:
    x = randn(4, 2000, dtype=dtype)
    check(lambda v: (v.sum(1), v.mean(1), v.amax(1), v.var(1)), x)


def test_integers() -> None:
    x = torch.randint(-9, 9, (3, 4, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    check(lambda v: (v.sum(), v.sum(1), v.amax(2), v.argmin(0), v.prod(2), (v > 0).sum(1), v.any(1), v.all(0)), x)
    check(lambda v: (v.sum(0, dtype=torch.float32), v.float().sum(0, dtype=torch.float64)), x)


def test_nothing_to_reduce() -> None:
    x = randn(3, 0)
    check(lambda v: (v.sum(1), v.prod(1), v.mean(1), v.any(1), v.all(1), v.var(1), torch.logsumexp(v, 1), v.sum(0)), x)
    check(lambda v: v.amax(1), randn(0, 3))
    check(lambda v: (v.int().sum(1), *torch.var_mean(v, 1)), x)


def test_one_element() -> None:
    check(lambda v: (v.any(1), v.var(1), v.var(1, correction=0), v.sum(1), v.argmax(1)), torch.tensor([[2.5], [0.0]]))
    check(lambda v: (v.sum(0), v.amax(-1), v.mean(0)), torch.tensor(2.5))
    check(lambda v: v.sum(1), torch.ones(3, 1, dtype=torch.bool))


def test_variance_has_no_cancellation() -> None:
    x = randn(4, 300) + 1e4
    check(lambda v: (v.var(1), *torch.var_mean(v, 0)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2, 3, math.inf, -math.inf])
def test_norms(order: float) -> None:
    x = randn(4, 5, 6)
    check(lambda v: (torch.linalg.vector_norm(v, order, (1,)), torch.linalg.vector_norm(v, order)), x)
    check(lambda v: (torch.norm(v, 2, 1), v.norm()), x)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_and_gradients(dim: int, dtype: torch.dtype) -> None:
    x, g = randn(4, 5, 6, dtype=dtype) * 3, randn(4, 5, 6, dtype=dtype, seed=1)
    softmax = torch.ops.aten._softmax.default
    eps = torch.finfo(dtype).eps  # eager rounds the logarithm of the sum of 16-bit floats on the way
    check(lambda x: (softmax(x, dim, False), torch.ops.aten._log_softmax(x, dim, False)), x, rtol=2 * eps, atol=2 * eps)
    y, z = x.softmax(dim), x.log_softmax(dim)
    check(
        lambda g, y, z: (
            torch.ops.aten._softmax_backward_data(g, y, dim, dtype),
            torch.ops.aten._log_softmax_backward_data(g, z, dim, dtype),
        ),
        g, y, z, atol=2 * eps, rtol=2 * eps,
    )  # fmt: skip


def test_softmax_of_a_scalar_and_of_masked_rows() -> None:
    softmax = torch.ops.aten._softmax.default
    check(lambda x: softmax(x, 0, False), torch.tensor(2.0))
    check(lambda x: (softmax(x, 1, False), torch.logsumexp(x, 1)), torch.full((2, 3), -math.inf))


def test_symbolic_sizes() -> None:
    check(
        lambda x: (x.sum(0), x.mean(1), x.var(-1), torch.softmax(x, 1), torch.logsumexp(x, 0)),
        randn(5, 6),
        symbolic=True,
    )
