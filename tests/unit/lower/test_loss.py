import pytest
import torch
import torch.nn.functional as F

from tests.unit.lower.harness import check

aten = torch.ops.aten


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([3, 0, -100, 6, 3])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_negative_log_likelihood_and_gradient(reduction: int, weighted: bool) -> None:
    x, w = randn(5, 7).log_softmax(1), randn(7, seed=1).abs() if weighted else None
    check(lambda x, y, w: aten.nll_loss_forward(x, y, w, reduction, -100), x, LABELS, w)
    _, total = aten.nll_loss_forward(x, LABELS, w, reduction, -100)
    g = randn(5, seed=2) if reduction == 0 else torch.tensor(1.7)
    check(lambda g, x, y, w, t: aten.nll_loss_backward(g, x, y, w, reduction, -100, t), g, x, LABELS, w, total)


def test_one_row() -> None:
    check(lambda x, y: aten.nll_loss_forward(x, y, None, 1, -100), randn(7).log_softmax(0), torch.tensor(4))
    check(lambda x, y: aten.nll_loss_forward(x, y, None, 1, -100), randn(1, 7).log_softmax(1), torch.tensor([4]))


def test_mean_over_ignored_labels_only_is_nan() -> None:
    check(lambda x, y: aten.nll_loss_forward(x, y, None, 1, -100), randn(2, 7), torch.tensor([-100, -100]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradient, loss = torch.func.grad_and_value(lambda x: F.cross_entropy(x, y, label_smoothing=smoothing))(x)
        return loss, gradient

    check(function, randn(5, 7), LABELS, decompose=True)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_squared_error_and_gradient(reduction: int) -> None:
    x, y = randn(5, 7), randn(5, 7, seed=1)
    g = randn(5, 7, seed=2) if reduction == 0 else torch.tensor(1.7)
    check(lambda x, y: aten.mse_loss(x, y, reduction), x, y)
    check(lambda g, x, y: aten.mse_loss_backward(g, x, y, reduction), g, x, y)
