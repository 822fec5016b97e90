"""Equal gathers are one, a sum of reductions is a reduction of the sum, moved blocks are permuted views."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.capture.fewer_collectives import add_before_reducing, gather_once, move_blocks

comm = torch.ops._c10d_functional
aten = torch.ops.aten


class Traced:
    """A graph built by hand, with values as tracing leaves them; collectives keep their input's shape."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()

    def input(self, name: str, *shape: int) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        return node

    def __call__(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        if "c10d" in str(target):
            node.meta["val"] = args[0].meta["val"]  # type: ignore[attr-defined]
        else:
            with self.mode:
                node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))  # type: ignore[operator]
        return node

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(torch.nn.Module(), self.graph)


def _launches(gm: fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in gm.graph.nodes if "_c10d" in str(node.target)]
    return [name.split(".")[1] for name in names if "wait" not in name]


def test_equal_gathers_are_one() -> None:
    t = Traced()
    x, w = t.input("x", 4, 4), t.input("w", 4, 4)
    gathered = [t(comm.wait_tensor.default, t(comm.all_gather_into_tensor.default, x, 2, "g")) for _ in range(3)]
    other = t(comm.wait_tensor.default, t(comm.all_gather_into_tensor.default, x, 2, "h"))
    gm = t.module(*[t(aten.mm.default, y, w) for y in (*gathered, other)])
    assert gather_once(gm) == 2
    gm.graph.lint()
    assert _launches(gm) == ["all_gather_into_tensor"] * 2


def test_gathers_that_are_returned_stay() -> None:
    t = Traced()
    x = t.input("x", 4)
    gm = t.module(*[t(comm.wait_tensor.default, t(comm.all_gather_into_tensor.default, x, 2, "g")) for _ in range(2)])
    assert gather_once(gm) == 0


@pytest.mark.parametrize("op", [comm.reduce_scatter_tensor.default, comm.all_reduce.default])
def test_a_sum_of_reductions_is_a_reduction_of_the_sum(op: torch._ops.OpOverload) -> None:
    t = Traced()
    inputs = [t.input(name, 4) for name in "abc"]
    how = (2, "g") if "scatter" in str(op) else ("g",)
    a, b, c = (t(comm.wait_tensor.default, t(op, x, "sum", *how)) for x in inputs)
    gm = t.module(t(aten.add.Tensor, t(aten.add.Tensor, a, b), c))
    assert add_before_reducing(gm) == 2
    gm.graph.lint()
    assert len(_launches(gm)) == 1
    adds = [node for node in gm.graph.nodes if node.target is aten.add.Tensor]
    assert [node.name for node in adds[0].all_input_nodes] == ["a", "b"]


def test_reductions_that_differ_or_are_read_elsewhere_stay() -> None:
    t = Traced()
    a, b = t.input("a", 4), t.input("b", 4)
    first = t(comm.wait_tensor.default, t(comm.all_reduce.default, a, "sum", "g"))
    second = t(comm.wait_tensor.default, t(comm.all_reduce.default, b, "max", "g"))
    third = t(comm.wait_tensor.default, t(comm.all_reduce.default, b, "sum", "g"))
    gm = t.module(t(aten.add.Tensor, first, second), t(aten.add.Tensor, third, a), t(aten.sin.default, third))
    assert add_before_reducing(gm) == 0


@pytest.mark.parametrize(("source", "to"), [(0, 1), (0, 2), (1, 0), (2, 1), (2, 0)])
def test_moved_blocks_are_a_permuted_copy(source: int, to: int) -> None:
    t = Traced()
    x = t.input("x", 4, 6, 8)
    parts = t(aten.split.Tensor, x, x.meta["val"].shape[source] // 2, source)
    items = []
    for n in range(2):
        item = t.graph.call_function(operator.getitem, (parts, n))
        item.meta["val"] = parts.meta["val"][n]
        items.append(item)
    gm = t.module(t(aten.cat.default, items, to))
    before = fx.GraphModule(torch.nn.Module(), _copy(t.graph))
    assert move_blocks(gm) == 1
    gm.graph.lint()
    gm.recompile()
    assert not [node for node in gm.graph.nodes if node.target in (aten.cat.default, aten.split.Tensor)]
    value = torch.rand(4, 6, 8)
    torch.testing.assert_close(gm(value), before(value), atol=0, rtol=0)


def _copy(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    result = made.graph_copy(graph, {})
    made.output(result)
    return made


def test_parts_in_another_order_stay() -> None:
    t = Traced()
    x = t.input("x", 4, 6)
    parts = t(aten.split.Tensor, x, 2, 0)
    items = []
    for n in (1, 0):
        item = t.graph.call_function(operator.getitem, (parts, n))
        item.meta["val"] = parts.meta["val"][n]
        items.append(item)
    assert move_blocks(t.module(t(aten.cat.default, items, 1))) == 0
