"""Rows O: the CPU library's fused kernels, by themselves and as what conv, linear and their epilogues become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rows.check import Seen, chk

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
mkldnn, onednn = torch.ops.mkldnn, torch.ops.onednn


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        yield


def frozen(function: Any, *args: Any, also: Any = (), dynamic: bool | None = None) -> Seen:
    return chk(function, *args, also=also, freeze=True, dynamic=dynamic, rtol=1e-3, atol=1e-3)


CONV, LINEAR = "mkldnn._convolution_pointwise", "mkldnn._linear_pointwise"


# convolutions

UNARY: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
    "relu6": F.relu6,
    "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


class Then(nn.Module):
    """A layer and what follows it."""

    def __init__(self, layer: nn.Module, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.function(self.layer(x), *others)


class Twice(nn.Module):
    """A function of its argument, given twice."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, x)


@pytest.mark.row("O3")
@pytest.mark.parametrize("name", UNARY)
def test_a_convolution_and_what_follows_are_one_call(name: str) -> None:
    seen = frozen(Then(nn.Conv2d(16, 32, 3, padding=1), UNARY[name]), image(2, 16, 16, 16))
    assert (seen.K, seen.externs) == (0, (f"{CONV}.default",))


SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "stride": (nn.Conv2d(16, 32, 3, stride=2), (2, 16, 33, 32)),
    "padding and dilation": (nn.Conv2d(16, 32, 3, padding=(1, 2), dilation=2), (2, 16, 20, 18)),
    "groups": (nn.Conv2d(32, 64, 3, groups=4), (4, 32, 20, 20)),
    "no bias": (nn.Conv2d(16, 32, 3, bias=False), (2, 16, 20, 20)),
    "3-d": (nn.Conv3d(8, 16, 3, padding=1), (1, 8, 8, 12, 12)),
}


@pytest.mark.row("O1")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_convolutions(name: str, channels_last: bool) -> None:
    layer, shape = SHAPES[name]
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    seen = frozen(Then(layer, F.relu), x)
    assert seen.externs == (f"{CONV}.default",)
    assert (0 if channels_last and len(shape) == 4 else 1) == seen.K, "copied into the layout the tracer promised"


@pytest.mark.row("O1")
def test_layouts_inside_a_graph_follow_the_library() -> None:
    layers = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())
    seen = frozen(Then(layers, lambda y: y.sum((2, 3))), torch.randn(2, 16, 16, 16))
    assert (seen.K, seen.externs) == (1, (f"{CONV}.default",) * 2)


@pytest.mark.row("O1")
def test_one_dimension_stays_with_the_library_as_it_is() -> None:
    seen = frozen(Then(nn.Conv1d(32, 64, 5), F.relu), torch.randn(4, 32, 200))
    assert seen.externs == ("aten.convolution.default",)


@pytest.mark.row("O4")
@pytest.mark.parametrize(("then", "kernels"), [(lambda y: y, 0), (F.relu, 0), (F.silu, 1)])
@pytest.mark.parametrize("combine", [torch.add, torch.sub, torch.mul])
def test_a_convolution_and_another_tensor(combine: Any, then: Any, kernels: int) -> None:
    layer = Then(nn.Conv2d(16, 32, 3, padding=1), lambda y, other: then(combine(y, other)))
    seen = frozen(layer, image(2, 16, 16, 16), image(2, 32, 16, 16))
    assert (seen.K, seen.externs) == (kernels, (f"{CONV}.binary",))


@pytest.mark.row("O5")
def test_a_residual_that_dies_is_accumulated_into() -> None:
    beside = nn.Conv2d(16, 32, 1, bias=False)
    layer = Then(nn.Conv2d(16, 32, 3, padding=1), lambda y, x: F.relu(y + beside(x)))
    seen = frozen(Twice(layer), image(4, 16, 32, 32))
    assert seen.K == 0
    assert seen.externs == (f"{CONV}.default", "mkldnn._convolution_pointwise_.binary")
    (step,) = [s for s in seen.schedule if "mkldnn._convolution_pointwise_.binary" in s.ops]
    assert step.mutates
    assert step.aliases


@pytest.mark.row("O5")
def test_a_residual_that_is_read_again_is_not() -> None:
    def twice(y: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        kept = other.exp()
        return F.relu(y + kept), kept

    seen = frozen(Then(nn.Conv2d(16, 32, 3, padding=1), twice), image(2, 16, 16, 16), image(2, 32, 16, 16))
    assert seen.externs == (f"{CONV}.binary",)


@pytest.mark.row("O8")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution(groups: int) -> None:
    layer = nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1, output_padding=1, groups=groups)
    seen = frozen(Then(layer, F.relu), image(4, 16, 32, 32))
    assert (seen.K, seen.externs) == (0, ("mkldnn._convolution_transpose_pointwise.default",))


# linear layers


@pytest.mark.row("O2", "O7")
@pytest.mark.parametrize("shape", [(64, 256), (2, 32, 256), (2, 4, 8, 256)])
@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
def test_a_linear_layer_and_what_follows_are_one_call(name: str, shape: tuple[int, ...]) -> None:
    seen = frozen(Then(nn.Linear(256, 256), UNARY[name]), torch.randn(shape))
    assert (seen.K, seen.externs) == (0, (f"{LINEAR}.default",))


@pytest.mark.row("O7")
@pytest.mark.parametrize("shape", [(64,), (4, 16)])
def test_a_linear_layer_and_another_tensor(shape: tuple[int, ...]) -> None:
    layer = Then(nn.Linear(256, 256), lambda y, other: y + other)
    seen = frozen(layer, torch.randn(*shape, 256), torch.randn(*shape, 256))
    assert (seen.K, seen.externs) == (0, (f"{LINEAR}.binary",))


@pytest.mark.row("O6")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 256), (2, 32, 256)])
def test_a_linear_layer_alone_is_mkls_with_a_packed_weight(shape: tuple[int, ...], bias: bool) -> None:
    seen = frozen(nn.Linear(256, 256, bias=bias), torch.randn(shape))
    assert (seen.K, seen.externs) == (0, ("mkl._mkl_linear.default",))


@pytest.mark.row("O6")
def test_a_weight_that_changes_is_packed_again() -> None:
    layer = nn.Linear(256, 256)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="dcompile", options={"freeze": True, "cache_dir": None})
    x = torch.randn(64, 256)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=1e-3)
        layer.weight.add_(1.0)


@pytest.mark.row("O6")
def test_little_work_unknown_sizes_and_training_stay_as_they_are() -> None:
    assert frozen(Then(nn.Linear(8, 8), F.gelu), torch.randn(4, 8)).externs == ("aten.addmm.default",)
    unknown = frozen(nn.Linear(256, 256), torch.randn(64, 256), also=[(torch.randn(80, 256),)], dynamic=True)
    assert unknown.externs == ("aten.addmm.default",)
    with torch.enable_grad():
        seen = chk(nn.Linear(256, 256), torch.randn(64, 256, requires_grad=True), grad=True, freeze=True)
    assert not any(op.startswith("mk") for op in seen.externs)
    assert chk(nn.Linear(256, 256), torch.randn(64, 256)).externs == ("aten.addmm.default",)


@pytest.mark.row("O3")
def test_nan_through_relu_is_kept_unless_frozen() -> None:
    layer = Then(nn.Conv2d(16, 32, 3, padding=1), F.relu)
    x = torch.randn(2, 16, 16, 16)
    x[0, 0, 0, 0] = float("nan")
    seen = chk(layer, x)
    assert seen.result.isnan().any()
    assert seen.K == 1


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
    torch.testing.assert_close(found, exact.clamp(max=155 * 0.5 if out is None else 1e9), rtol=1e-2, atol=0.3)


def run(function: Any, *args: Any) -> Seen:
    """As ``chk``, for arguments in the library's own layout, which can be neither copied nor compared."""
    return chk(Holder(function, args[1:]), args[0])


@pytest.mark.row("O11")
def test_a_quantised_convolution_accumulates_into_another_tensor() -> None:
    weight, scales, zeros, bias, floats = packed_convolution(8, [2, 4, 6, 6], True)

    def call(x: Tensor, accum: Tensor, *rest: Any) -> Tensor:
        total = accum + 0.0
        y: Tensor = onednn.qconv2d_pointwise.binary(
            x, X_SCALE, X_ZERO, *rest[:3], total, rest[3], [1, 1], [1, 1], [1, 1], 1, 1.0, 0, torch.float32, 1.0, 0,
            "sum", 1.0, "relu", [], "",
        )  # fmt: skip
        return y * 1.0

    x, accum = levels(2, 4, 6, 6), torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    seen = run(call, x, accum, weight, scales, zeros, bias)
    assert "onednn.qconv2d_pointwise.binary" in seen.externs
    assert seen.fallbacks == ()
    exact = torch.relu(torch.conv2d((x.float() - X_ZERO) * X_SCALE, floats, bias, 1, 1) + accum)
    torch.testing.assert_close(seen.result, exact, rtol=1e-2, atol=0.3)


@pytest.mark.row("O11")
def test_other_accumulations_are_refused() -> None:
    weight, scales, zeros, bias, _ = packed_convolution(8, [2, 4, 6, 6], True)

    def call(x: Tensor, accum: Tensor) -> Tensor:
        y: Tensor = onednn.qconv2d_pointwise.binary(
            x, X_SCALE, X_ZERO, weight, scales, zeros, accum, bias, [1, 1], [1, 1], [1, 1], 1, 1.0, 0, torch.float32,
            1.0, 0, "mul", 1.0, "none", [], "",
        )  # fmt: skip
        return y

    torch.compiler.reset()
    compiled = torch.compile(call, backend="dcompile", options={"cache_dir": None})
    x, accum = levels(2, 4, 6, 6), torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with pytest.raises(Exception, match="mul"):
        compiled(x, accum)


@pytest.mark.row("O12")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dynamic_scales", [False, True])
@pytest.mark.parametrize("out", [torch.uint8, torch.float32])
def test_a_quantised_linear_layer(with_bias: bool, dynamic_scales: bool, out: torch.dtype) -> None:
    whole = torch.randint(-128, 127, (16, 32), dtype=torch.int8)
    scales = torch.rand(16) * 0.02 + 0.01
    weight = onednn.qlinear_prepack(whole, [8, 32])
    bias = torch.randn(16) if with_bias else None
    given = (torch.tensor(X_SCALE), torch.tensor(X_ZERO)) if dynamic_scales else (X_SCALE, X_ZERO)
    scale, zero = (1.0, 0) if out is torch.float32 else (0.5, 100)

    def call(x: Tensor, *rest: Any) -> Tensor:
        y: Tensor = onednn.qlinear_pointwise(x, *given, *rest, scale, zero, out, "none", [], "")
        return y

    x = torch.randint(0, 40, (8, 32), dtype=torch.uint8)
    seen = run(call, x, weight, scales, torch.zeros(16, dtype=torch.int32), bias)
    assert (seen.K, seen.X, seen.fallbacks) == (0, 1, ())
    exact = ((x.float() - X_ZERO) * X_SCALE) @ (whole.float() * scales[:, None]).t() + (0 if bias is None else bias)
    limits = (-50.0, 77.5) if out is torch.uint8 else (-1e9, 1e9)
    torch.testing.assert_close((seen.result.float() - zero) * scale, exact.clamp(*limits), rtol=1e-2, atol=0.3)


class Holder(nn.Module):
    """A function with the rest of its arguments."""

    def __init__(self, function: Any, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.rest = function, rest

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.rest)

    def __deepcopy__(self, memo: Any) -> Holder:
        return self
