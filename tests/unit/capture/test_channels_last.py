"""Convolutions of CUDA graphs get channels-last operands; what leaves the graph keeps its layout."""

from __future__ import annotations

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
