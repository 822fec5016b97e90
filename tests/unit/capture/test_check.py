"""What cannot be compiled is refused with the user's line and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.capture.check import check
from dcompile.errors import Unsupported
from tests.multi_gpu.eager_backend import EagerBackend


def _refused(f: Any, *inputs: Any) -> str:
    torch._dynamo.reset()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Dynamo wraps what a backend raises
        torch.compile(f, backend=EagerBackend())(*inputs)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Unsupported):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    assert isinstance(error, Unsupported), caught.value
    return str(error)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_element_type_without_support(dtype: torch.dtype) -> None:
    message = _refused(lambda x: x.to(dtype), torch.rand(4))
    assert Path(__file__).name in message
    assert str(dtype) in message
    assert "Instead: convert it" in message


def test_sparse_tensor() -> None:
    gm = _graph_with(torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.rand(2), (3,)))
    with pytest.raises(Unsupported, match=r"train\.py:41: .*sparse_coo.*to_dense"):
        check(gm)


def test_quantised_tensor() -> None:
    gm = _graph_with(torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8))
    with pytest.raises(Unsupported, match=r"train\.py:41: .*qint8.*dequantize"):
        check(gm)


def test_two_gpus_in_one_graph() -> None:
    with FakeTensorMode():
        gm = _graph_with(torch.empty(3, device="cuda:0"), torch.empty(3, device="cuda:1"))
    with pytest.raises(Unsupported, match=r"train\.py:41: .*cuda:0.*cuda:1"):
        check(gm)


def test_cpu_and_gpu_may_meet() -> None:
    with FakeTensorMode():
        check(_graph_with(torch.empty(3), torch.empty(3, device="cuda")))


def test_unknown_device() -> None:
    with pytest.raises(Unsupported, match=r"device meta"):
        check(_graph_with(torch.empty(3, device="meta")))


def test_cpu_scalar_beside_gpu_tensors_and_complex_are_fine() -> None:
    with FakeTensorMode():
        gm = _graph_with(torch.empty(()), torch.empty(3, device="cuda", dtype=torch.complex64))
    check(gm)


def _graph_with(*values: torch.Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    for position, value in enumerate(values):
        node = graph.placeholder(f"x{position}")
        node.meta["val"] = value
        node.meta["dcompile_source"] = "train.py:41"
    graph.output(())
    return fx.GraphModule(torch.nn.Module(), graph)
