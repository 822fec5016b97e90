"""Rows O: the CPU library's fused kernels, by themselves and as what conv, linear and their epilogues become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.rows.check import Seen, chk

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
mkldnn, onednn = torch.ops.mkldnn, torch.ops.onednn


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        yield


# recurrent layers


@pytest.mark.row("O9")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_is_one_call_for_each_layer_and_direction(batch_first: bool, bidirectional: bool) -> None:
    layer = nn.LSTM(4, 8, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    seen = chk(layer, torch.randn(3, 2, 4))
    calls = [op for op in seen.externs if op == "aten.mkldnn_rnn_layer.default"]
    assert len(calls) == 2 * (2 if bidirectional else 1)
    assert seen.fallbacks == ()


# quantised


def packed_convolution(channels: int, shape: list[int], with_bias: bool) -> tuple[Tensor, ...]:
    """Weight in the library's layout, its scales and zero points, bias, and the weight as floats."""
    scales = torch.rand(channels) * 0.02 + 0.01
    whole = torch.randint(-128, 127, (channels, shape[1], 3, 3), dtype=torch.int8)
    weight = onednn.qconv_prepack(whole, scales, 0.05, 10, [1, 1], [1, 1], [1, 1], 1, shape)
    bias = torch.randn(channels) if with_bias else None
    floats = whole.float() * scales[:, None, None, None]
    return weight, scales, torch.zeros(channels, dtype=torch.int32), bias, floats  # type: ignore[return-value]


def levels(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


X_SCALE, X_ZERO = 0.05, 10


@pytest.mark.row("O10")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
def test_a_quantised_convolution(with_bias: bool, out: torch.dtype | None) -> None:
    weight, scales, zeros, bias, floats = packed_convolution(8, [2, 4, 6, 6], with_bias)
    scale, zero = (1.0, 0) if out else (0.5, 100)

    def call(x: Tensor, w: Tensor, s: Tensor, z: Tensor, b: Tensor | None) -> Tensor:
        y: Tensor = onednn.qconv2d_pointwise(
            x, X_SCALE, X_ZERO, w, s, z, b, [1, 1], [1, 1], [1, 1], 1, scale, zero, out, "relu", [], ""
        )
        return y

    x = levels(2, 4, 6, 6)
    seen = run(call, x, weight, scales, zeros, bias)
    assert (seen.K, seen.X, seen.fallbacks) == (0, 1, ())
    exact = torch.relu(torch.conv2d((x.float() - X_ZERO) * X_SCALE, floats, bias, 1, 1))
    found = (seen.result.float() - zero) * scale
    torch.testing.assert_close(found, exact.clamp(max=155 * 0.5 if out is None else None), rtol=1e-2, atol=0.3)


def run(function: Any, *args: Any) -> Seen:
    """As ``chk``, for arguments in the library's own layout, which can be neither copied nor compared."""
    return chk(Holder(function, args[1:]), args[0])


class Holder(nn.Module):
    """A function with the rest of its arguments."""

    def __init__(self, function: Any, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.rest = function, rest

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.rest)

    def __deepcopy__(self, memo: Any) -> Holder:
        return self
