"""Convolutions of CUDA graphs get channels-last operands; what leaves the graph keeps its layout."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dcompile.capture import channels_last
from dcompile.capture.channels_last import prefer_channels_last, restore_gradients

SHAPES = {"x": (2, 4, 8, 8), "w": (6, 4, 3, 3), "up": (6, 5, 2, 2)}


def network(x: Tensor, w: Tensor, up: Tensor) -> Tensor:
    return F.conv_transpose2d(F.conv2d(x, w, padding=1).relu(), up, stride=2)


def graph_of(function: object, tensors: list[Tensor]) -> fx.GraphModule:
    """As Dynamo hands it over: every value with its example."""
    gm = fx.symbolic_trace(function)  # type: ignore[arg-type]
    values: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = node.meta["example_value"] = tensors[len(values)]
    (result,) = (gm(*tensors),)
    gm.graph.find_nodes(op="output")[0].args[0].meta["example_value"] = result
    return gm


def contiguous_calls(gm: fx.GraphModule) -> list[object]:
    return [node.kwargs["memory_format"] for node in gm.graph.nodes if node.target == "contiguous"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_last, "_on_cuda", lambda inputs: True)


@pytest.fixture
def tensors() -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.bfloat16) for shape in SHAPES.values()]


@pytest.mark.usefixtures("on_gpu")
def test_operands_are_channels_last_and_the_result_as_before(tensors: list[Tensor]) -> None:
    gm = graph_of(network, tensors)
    want = gm(*tensors)
    prefer_channels_last(gm, tensors)
    found = gm(*tensors)
    assert contiguous_calls(gm) == [torch.channels_last] * 4 + [torch.contiguous_format]
    assert found.stride() == want.stride()
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


def test_other_devices_are_left_alone(tensors: list[Tensor]) -> None:
    gm = graph_of(network, tensors)
    prefer_channels_last(gm, tensors)
    assert contiguous_calls(gm) == []


@pytest.mark.usefixtures("on_gpu")
def test_single_precision_is_left_alone(tensors: list[Tensor]) -> None:
    wide = [t.float() for t in tensors]
    gm = graph_of(network, wide)
    prefer_channels_last(gm, wide)
    assert contiguous_calls(gm) == []


@pytest.mark.usefixtures("on_gpu")
def test_grouped_convolutions_take_what_they_get(tensors: list[Tensor]) -> None:
    x, w = tensors[0], torch.randn(4, 1, 3, 3, dtype=torch.bfloat16)
    gm = graph_of(lambda x, w: torch.conv2d(x, w, None, 1, 1, 1, 4), [x, w])
    prefer_channels_last(gm, [x, w])
    assert contiguous_calls(gm) == []


def test_gradients_get_the_layout_of_their_parameters() -> None:
    graph = fx.Graph()
    primal = graph.placeholder("primals_1")
    tangent = graph.placeholder("tangents_1")
    primal.meta["val"] = torch.empty(6, 4, 3, 3)
    tangent.meta["val"] = torch.empty(6, 4, 3, 3).to(memory_format=torch.channels_last)
    graph.output([primal, tangent])
    joint = fx.GraphModule(torch.nn.Module(), graph)
    restore_gradients(joint, 1)
    joint.recompile()
    weight, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    _, found = joint(weight, gradient)
    assert found.is_contiguous()
    assert torch.equal(found, gradient)


def test_a_training_step_is_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_on_cuda", "_in_16_bits"):
        monkeypatch.setattr(channels_last, name, lambda *inputs: True)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    eager = torch.nn.Sequential(*layers, torch.nn.ConvTranspose2d(8, 4, 2, 2))
    other = copy.deepcopy(eager)
    x = torch.randn(2, 3, 17, 19, requires_grad=True)
    other_x = x.detach().clone().requires_grad_()
    y, other_y = eager(x), torch.compile(other, backend="dcompile", dynamic=False)(other_x)
    assert other_y.stride() == y.stride()
    torch.testing.assert_close(other_y, y, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (other_y * weight).sum().backward()
    pairs = [(x, other_x), *zip(eager.parameters(), other.parameters(), strict=True)]
    for a, b in pairs:
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.stride() == a.grad.stride()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)
