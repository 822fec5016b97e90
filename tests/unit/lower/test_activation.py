import pytest
import torch
import torch.nn.functional as F

from tests.unit.lower.harness import check

aten = torch.ops.aten
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


FORWARD = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 1.3),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "softplus": lambda x: F.softplus(x, 2.0, 5.0),
    "threshold": lambda x: F.threshold(x, 0.1, -20.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, dtype: torch.dtype) -> None:
    check(FORWARD[name], randn(4, 9, dtype=dtype))


def test_prelu_slopes_per_channel() -> None:
    check(F.prelu, randn(2, 3, 4), torch.tensor([0.1, -0.2, 0.5]))


BACKWARD = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_tanh": lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    "sigmoid": lambda g, x: aten.sigmoid_backward(g, x.sigmoid()),
    "tanh": lambda g, x: aten.tanh_backward(g, x.tanh()),
    "threshold": lambda g, x: aten.threshold_backward(g, x, 0),
    "leaky_relu": lambda g, x: aten.leaky_relu_backward(g, x, 0.2, False),
    "elu": lambda g, x: aten.elu_backward(g, 1.3, 1.0, 1.0, False, x),
    "elu_of_result": lambda g, x: aten.elu_backward(g, 1.3, 1.0, 1.0, True, x),
    "hardtanh": lambda g, x: aten.hardtanh_backward(g, x, -0.5, 0.7),
    "softplus": lambda g, x: aten.softplus_backward(g, x, 2.0, 5.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str, dtype: torch.dtype) -> None:
    check(BACKWARD[name], randn(4, 9, dtype=dtype), randn(4, 9, dtype=dtype, seed=1))
