"""source_of: nodes know the user's line, in the forward and in the backward graph."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import nn

from dcompile.capture import source_of
from tests.multi_gpu.eager_backend import EagerBackend

HERE = Path(__file__).name


def program(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    return y * x


def test_every_op_has_its_line_also_in_the_backward() -> None:
    torch._dynamo.reset()
    backend = EagerBackend()
    torch.compile(program, backend=backend)(torch.randn(3, requires_grad=True)).sum().backward()
    first = inspect.getsourcelines(program)[1]
    lines = {
        captured.kind: {str(n.target): source_of(n) for n in captured.gm.graph.nodes if n.op == "call_function"}
        for captured in backend.graphs
    }
    assert lines["forward"]["aten.sin.default"] == f"{HERE}:{first + 1}"
    assert lines["forward"]["aten.mul.Tensor"] == f"{HERE}:{first + 2}"
    assert lines["backward"]["aten.cos.default"] == f"{HERE}:{first + 1}"
    assert all(lines["backward"].values())


def test_library_module_by_itself_names_the_module() -> None:
    torch._dynamo.reset()
    backend = EagerBackend()
    torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend=backend)(torch.randn(2, 4))
    sources = {str(n.target): source_of(n) for n in backend.graphs[0].gm.graph.nodes if n.op == "call_function"}
    assert sources["aten.addmm.default"].endswith(".0:Linear")
    assert sources["aten.relu.default"].endswith(".1:ReLU")


def test_a_node_without_a_trace_is_unknown() -> None:
    graph = torch.fx.Graph()
    assert source_of(graph.placeholder("x")) == ""


def test_frames_of_the_library_are_skipped() -> None:
    node = torch.fx.Graph().placeholder("x")
    library = Path(torch.__file__).parent / "nn" / "functional.py"
    user, inner = (f'  File "{file}", line {line}, in f\n' for file, line in (("/mine/train.py", 41), (library, 7)))
    node.meta["stack_trace"] = user + inner
    assert source_of(node) == "train.py:41"
