"""Python objects in a graph go around the compiled program."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dcompile.capture.opaque import lift_opaque
from dcompile.errors import Unsupported


class Mesh:
    """Stands for any object that is neither a tensor nor a number."""


def _graph(used: bool = False) -> fx.GraphModule:
    graph = fx.Graph()
    mesh, x = graph.placeholder("mesh"), graph.placeholder("x")
    mesh.meta["val"], x.meta["val"] = Mesh(), torch.randn(2)
    constant = graph.get_attr("constant")
    y = graph.call_function(torch.add, (x, 1))
    results = [mesh, y, constant, x, mesh]
    if used:
        results.append(graph.call_function(torch.sub, (x, mesh)))
    graph.output(tuple(results))
    root = torch.nn.Module()
    root.constant = Mesh()
    return fx.GraphModule(root, graph)


def test_objects_are_handed_back_in_their_places() -> None:
    gm = _graph()
    constant = gm.constant
    left, around, gone = lift_opaque(gm, ["mesh", "x"])
    assert left == ["x"]
    assert gone == (0, 2, 4)
    run = around(lambda inputs: gm(*inputs))
    mesh, x = Mesh(), torch.randn(2)
    arguments = [mesh, x]
    found = run(arguments)
    assert arguments == []
    assert found[0] is mesh
    assert found[4] is mesh
    assert found[2] is constant
    torch.testing.assert_close(found[1], x + 1)
    assert found[3] is x


def test_an_op_that_takes_an_object_is_refused() -> None:
    with pytest.raises(Unsupported, match="Python object"):
        lift_opaque(_graph(used=True), ["mesh", "x"])


def test_graphs_without_objects_stay() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    program = gm.forward
    left, around, gone = lift_opaque(gm, ["x"])
    assert left == ["x"]
    assert gone == ()
    assert around(program) is program
