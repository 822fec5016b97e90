"""The partition keeps communication nobody uses in its half, and saves rather than recomputes collectives."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dcompile.capture.partition import partition

comm = torch.ops._c10d_functional
aten = torch.ops.aten


def _joint(forward_unused: bool, backward_unused: bool, wait: bool) -> fx.GraphModule:
    """y = sin(x); dx = cos(x) * dy, with a collective on either side whose result nobody needs."""
    graph = fx.Graph()
    value = torch.rand(4)

    def add(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = torch.rand(4)
        return node

    def unused(of: fx.Node) -> None:
        pending = add(comm.all_reduce.default, of, "sum", "g")
        if wait:
            add(comm.wait_tensor.default, pending)

    x, dy = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    x.meta["val"] = dy.meta["val"] = value
    y = add(aten.sin.default, x)
    if forward_unused:
        unused(y)
    dx = add(aten.mul.Tensor, add(aten.cos.default, x), dy)
    if backward_unused:
        unused(dx)
    graph.output((y, dx))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(("in_forward", "in_backward"), [(True, False), (False, True), (True, True), (False, False)])
def test_unused_communication_stays_in_its_half(in_forward: bool, in_backward: bool, wait: bool) -> None:
    forward, backward = partition(_joint(in_forward, in_backward, wait), (), num_fwd_outputs=1)
    for gm, expected, outputs in ((forward, in_forward, 2), (backward, in_backward, 1)):
        assert len(gm.graph.find_nodes(op="call_function", target=comm.all_reduce.default)) == expected
        waits = gm.graph.find_nodes(op="call_function", target=comm.wait_tensor.default)
        assert len(waits) == (expected and wait)
        (output,) = gm.graph.find_nodes(op="output")
        assert len(output.args[0]) == outputs  # forward: result and what is saved; backward: the gradient
