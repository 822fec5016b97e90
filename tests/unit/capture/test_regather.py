"""Gathers of sharded parameters: directly before their first reader, and once more in the backward graph."""

from __future__ import annotations

import torch
from torch import fx

from dcompile.capture.regather import AGAIN, GATHER, KEEP, gather_again, gather_before_use

ops = torch.ops._c10d_functional
aten = torch.ops.aten


def _op(graph: fx.Graph, target: torch._ops.OpOverload, args: tuple[fx.Node | int | str, ...]) -> fx.Node:
    """A node with the name that tracing would give it."""
    return graph.create_node("call_function", target, args, name=target._schema.name.split("::")[1])


def _gathered(graph: fx.Graph, shard: fx.Node, mark: str) -> fx.Node:
    gather = _op(graph, ops.all_gather_into_tensor.default, (shard, 2, "0"))
    gather.meta["custom"] = {GATHER: mark}
    return _op(graph, ops.wait_tensor.default, (gather,))


def _targets(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def _forward(mark: str) -> fx.GraphModule:
    """Two parameters gathered in front; the products are returned and both gathered parameters saved, one as a view."""
    graph = fx.Graph()
    first, second, x = (graph.placeholder(name) for name in ("first", "second", "x"))
    full = [_gathered(graph, shard, mark) for shard in (first, second)]
    y = _op(graph, aten.mm.default, (x, full[0]))
    turned = _op(graph, aten.t.default, (full[1],))
    z = _op(graph, aten.mm.default, (y, full[1]))
    graph.output((z, full[0], turned, x))
    return fx.GraphModule(torch.nn.Module(), graph)


def _backward() -> fx.GraphModule:
    graph = fx.Graph()
    wait, turned, x, tangent = (graph.placeholder(name) for name in ("wait_tensor", "t", "x", "tangents_1"))
    inner = _op(graph, aten.mm.default, (tangent, turned))
    outer = _op(graph, aten.mm.default, (inner, wait))
    graph.output((outer, x))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_a_gather_stands_before_its_first_reader() -> None:
    gm = _forward(KEEP)
    gather_before_use(gm)
    names = _targets(gm)
    assert names.index("all_gather_into_tensor") < names.index("mm") < names.index("all_gather_into_tensor_1")
    gm.graph.lint()


def test_unmarked_collectives_stay_where_they_are() -> None:
    gm = _forward(KEEP)
    for node in gm.graph.nodes:
        node.meta.pop("custom", None)
    before = _targets(gm)
    gather_before_use(gm)
    assert _targets(gm) == before


def test_shards_are_saved_instead_and_gathered_again() -> None:
    fwd, bwd = _forward(AGAIN), _backward()
    assert gather_again(fwd, bwd, num_fwd_outputs=1) == 2
    output = next(node for node in fwd.graph.nodes if node.op == "output")
    assert [str(item) for item in output.args[0]] == ["mm_1", "first", "second", "x"]
    names = _targets(bwd)
    assert names[:4] == ["first", "second", "x", "tangents_1"]
    assert sum(name.startswith("all_gather") for name in names) == 2
    views = [node for node in bwd.graph.nodes if node.target is aten.t.default]
    assert len(views) == 1, "the view of the gathered parameter is taken again"


def test_a_shard_that_is_saved_already_is_saved_once() -> None:
    fwd, bwd = _forward(AGAIN), _backward()
    output = next(node for node in fwd.graph.nodes if node.op == "output")
    shard = next(node for node in fwd.graph.nodes if node.name == "first")
    output.args = ((*output.args[0], shard),)
    tangent = next(node for node in bwd.graph.nodes if node.name == "tangents_1")
    with bwd.graph.inserting_before(tangent):
        bwd.graph.placeholder("first")
    gather_again(fwd, bwd, num_fwd_outputs=1)
    output = next(node for node in fwd.graph.nodes if node.op == "output")
    assert [str(item) for item in output.args[0]] == ["mm_1", "second", "x", "first"]
    assert _targets(bwd)[:4] == ["second", "x", "first", "tangents_1"]


def test_kept_parameters_stay_saved() -> None:
    fwd, bwd = _forward(KEEP), _backward()
    assert gather_again(fwd, bwd, num_fwd_outputs=1) == 0


def test_a_value_of_two_inputs_is_not_gathered_again() -> None:
    fwd, bwd = _forward(AGAIN), _backward()
    output = next(node for node in fwd.graph.nodes if node.op == "output")
    product = next(node for node in fwd.graph.nodes if node.name == "mm")
    output.args = ((output.args[0][0], product),)
    assert gather_again(fwd, bwd, num_fwd_outputs=1) == 0
