"""Merging equal computations."""

from __future__ import annotations

import torch
from torch import fx

from dcompile.capture.cse import merge_equal

comm = torch.ops._c10d_functional
aten = torch.ops.aten


def test_equal_computations_merge_but_not_launches_random_ops_or_outputs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.rand(4)

    def add(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = torch.rand(4)
        return node

    sines = [add(aten.sin.default, x) for _ in range(2)]
    launches = [add(comm.all_reduce.default, sine, "sum", "g") for sine in sines]
    draws = [add(aten.bernoulli.p, sine, 0.5) for sine in sines]
    scales = [add(aten.mul.Tensor, x, scale) for scale in (0.0, -0.0, 2, 2.0)]
    returned = [add(aten.cos.default, x) for _ in range(2)]
    graph.output((*[add(aten.add.Tensor, a, 1) for a in (*launches, *draws, *scales)], *returned))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert merge_equal(gm) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=aten.sin.default)) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=comm.all_reduce.default)) == 2
