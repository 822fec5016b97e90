"""Collectives in Dynamo's graph: mutating forms become functional ones, which AOTAutograd accepts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dcompile.capture.comm import communication, op_name

IN_PLACE = {
    "all_reduce_": "all_reduce",
    "broadcast_": "broadcast",
    "all_reduce_coalesced_": "all_reduce_coalesced",
}
"""Ops that overwrite their first argument, and the op that computes the same into new memory."""

INTO_OUT = {
    "all_gather_into_tensor_out": "all_gather_into_tensor",
    "reduce_scatter_tensor_out": "reduce_scatter_tensor",
}
"""Ops that overwrite their ``out`` argument, and the op that computes the same into new memory."""


def functionalise_collectives(gm: fx.GraphModule) -> None:
    """Rewrite mutating functional collectives in ``gm`` and its sub-graphs, in place.

    ``y = all_reduce_(x, …)`` becomes ``r = all_reduce(x, …); w = wait_tensor(r); x.copy_(w)`` and ``y`` becomes ``x``.
    A wait of ``y`` that follows has nothing left to wait for and goes in ``normalise``. That the result may be computed
    in the memory of ``x`` is found again after lowering, where storage is known.
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            mutating = [node for node in module.graph.nodes if communication(node) in IN_PLACE | INTO_OUT]
            for node in mutating:
                _rewrite(node)
            if mutating:
                module.graph.lint()
                module.recompile()


def _rewrite(node: fx.Node) -> None:
    name = communication(node)
    arguments = _arguments(node)
    into = arguments.pop("out") if name in INTO_OUT else next(iter(arguments.values()))
    namespace = getattr(torch.ops, op_name(node.target).partition(".")[0])
    functional = getattr(namespace, (IN_PLACE | INTO_OUT)[name]).default
    graph = node.graph

    def add(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        return made

    def finish(result: fx.Node, target: fx.Node) -> None:
        waited = add(torch.ops._c10d_functional.wait_tensor.default, result)
        add(torch.ops.aten.copy_.default, target, waited)

    with graph.inserting_before(node):
        result = add(functional, *arguments.values())
        if not isinstance(into, (list, tuple)):
            finish(result, into)
            node.replace_all_uses_with(into)
        else:
            for position, target in enumerate(into):
                finish(add(operator.getitem, result, position), target)
            _replace_items(node, into)
    graph.erase_node(node)


def _replace_items(node: fx.Node, into: Any) -> None:
    """Replace ``node[i]`` by ``into[i]``; any other use of the list gets the list itself."""
    for user in list(node.users):
        if user.target is operator.getitem and user.args[0] is node:
            user.replace_all_uses_with(into[user.args[1]])
            user.graph.erase_node(user)
        else:
            user.args = fx.map_arg(user.args, lambda a: list(into) if a is node else a)
            user.kwargs = fx.map_arg(user.kwargs, lambda a: list(into) if a is node else a)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by their name in the schema, in the schema's order however the caller ordered its keywords."""
    target = node.target if isinstance(node.target, torch._ops.OpOverload) else node.target.default  # type: ignore[union-attr]
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] for name in names if name in given}
