"""Clean-up of an ATen graph: no detach noise, one namespace for collectives, one wait for each collective's result."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

from dcompile.capture.comm import (
    AUTOGRAD_NAMESPACE,
    NAMESPACE,
    acts,
    communication,
    eliminate_dead_code,
    is_launch,
    is_view,
    is_wait,
    op_name,
    view_root,
)

aten = torch.ops.aten
SCALAR = "dcompile_scalar"
"""Key of ``node.meta`` under which the number in a constant tensor is handed to the next stages."""
_NOISE = (aten.detach.default, aten.alias.default)


def normalise(gm: fx.GraphModule) -> None:
    """Bring ``gm`` into the form the next stages expect, in place."""
    _call_directly(gm)
    _drop_noise(gm)
    _read_constants(gm)
    _ask_for_numbers(gm)
    _one_namespace(gm)
    if any(communication(node) for node in gm.graph.nodes):
        _Waits(gm).run()
        _drop_copies(gm)
    eliminate_dead_code(gm)
    gm.graph.lint()
    gm.recompile()


def drop_idle_waits(gm: fx.GraphModule) -> None:
    """Remove waits for what this graph computes by other means than a collective, in place.

    Comes before ``write_in_place``: afterwards such a value may be an input, and waits for inputs stay, because another
    graph may have launched what they wait for.
    """
    waits = _Waits(gm)
    for node in list(gm.graph.nodes):
        if is_wait(node):
            waits.drop_if_idle(node)


def _call_directly(gm: fx.GraphModule) -> None:
    """Replace calls that are kept in order by tokens; a call without a result stays, in program order, without them."""
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.prims._sink_tokens.default:
            gm.graph.erase_node(node)
        if node.target is not torch.ops.higher_order.with_effects:
            continue
        token, target, *arguments = node.args
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(target, tuple(arguments), dict(node.kwargs))
        call.meta = {**node.meta, "val": _untokened(node)}
        for user in list(node.users):
            position = user.args[1]
            if position == 0:
                user.replace_all_uses_with(token)
            elif len(node.meta["val"]) == 2:
                user.replace_all_uses_with(call)
            else:
                user.args = (call, position - 1)
                continue
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _untokened(node: fx.Node) -> Any:
    _, *results = node.meta["val"]
    return results[0] if len(results) == 1 else tuple(results)


def _drop_noise(gm: fx.GraphModule) -> None:
    """Remove ``detach`` and ``alias``, which mean nothing below autograd, except where a graph returns their result."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _NOISE and not any(u.op == "output" for u in node.users):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _read_constants(gm: fx.GraphModule) -> None:
    """Note the numbers in constant tensors of one element; later stages cannot read them while tracing."""
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        found: Any = gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.numel() == 1:
            with disable_current_modes():
                node.meta[SCALAR] = found.item()


def _ask_for_numbers(gm: fx.GraphModule) -> None:
    """Note what custom ops return that return numbers alone: tracing keeps the number and forgets where it is from."""
    for node in gm.graph.nodes:
        if (
            acts(node)
            and "val" not in node.meta
            and isinstance(node.target, OpOverload)
            and node.target._schema.returns
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)


def _one_namespace(gm: fx.GraphModule) -> None:
    """Autograd forms of collectives compute the same as the plain ones once gradients are in the graph."""
    for node in gm.graph.nodes:
        namespace, _, name = op_name(node.target).partition(".")
        if namespace == AUTOGRAD_NAMESPACE:
            node.target = getattr(getattr(torch.ops, NAMESPACE), name).default


def _drop_copies(gm: fx.GraphModule) -> None:
    """``copy(x, wait_tensor(r))`` is the waited tensor itself: what a rewritten in-place collective leaves behind.

    Not if the waited tensor has other users (eager has two tensors then), or is converted, broadcast or laid out anew.
    """
    for node in list(gm.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        source = node.args[1]
        if is_wait(source) and len(source.users) == 1 and _same_layout(node, source):
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride() and x.device == y.device)


class _Waits:
    """Rewrites waits so that each result tensor of a collective is waited for once, directly, before its first read.

    In eager a wait is on storage: waiting for a view of a result completes the result and all its views. Here the
    result itself is waited for, and its views that are read later become views of the waited tensor. A result that is
    read without a wait gets one before the read. A result never read is left alone (its graph returns it still in
    flight, or nobody uses it). A wait for something that no collective of this graph computes is dropped, unless it may
    come from another graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.waited: dict[fx.Node, fx.Node] = {}
        self.result: dict[fx.Node, fx.Node | None] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if is_wait(node):
                self._visit_wait(node)
            elif node.op == "call_function" and not is_view(node):
                for source in node.all_input_nodes:
                    result = self._result_of(source)
                    if result is not None and result not in self.waited:
                        self._wait(result, node)

    def _result_of(self, node: fx.Node) -> fx.Node | None:
        """The tensor of a collective in flight that ``node`` is, or is a view of; None if it is neither."""
        if node not in self.result:
            if is_launch(node):
                self.result[node] = None if isinstance(node.meta.get("val"), (list, tuple)) else node
            elif node.target is operator.getitem and is_launch(node.args[0]):  # type: ignore[arg-type]
                self.result[node] = node
            elif is_view(node) and isinstance(node.args[0], fx.Node):
                self.result[node] = self._result_of(node.args[0])
            else:
                self.result[node] = None
        return self.result[node]

    def drop_if_idle(self, node: fx.Node) -> None:
        """Remove a wait for something that is neither a collective's result nor an input."""
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        if self._result_of(argument) is None and view_root(argument).op == "call_function":
            node.replace_all_uses_with(argument)
            self.graph.erase_node(node)

    def _visit_wait(self, node: fx.Node) -> None:
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        result = self._result_of(argument)
        if result is None:
            self.drop_if_idle(node)
            return
        if argument is result and result not in self.waited:
            self._wait(result, node, node)
            return
        if result not in self.waited:
            self._wait(result, node)
        # The wait's own argument now reads the waited tensor, or a view of it.
        (argument,) = node.args
        node.replace_all_uses_with(argument)  # type: ignore[arg-type]
        self.graph.erase_node(node)

    def _wait(self, result: fx.Node, before: fx.Node, wait: fx.Node | None = None) -> None:
        """Wait for ``result`` at ``before``, by the node ``wait`` if given; later readers read the waited tensor."""
        if wait is None:
            with self.graph.inserting_before(before):
                wait = self.graph.call_function(getattr(torch.ops, NAMESPACE).wait_tensor.default, (result,))
            wait.meta = dict(result.meta)
        self.waited[result] = wait
        self.position[wait] = self.position[before]
        replaced = {result: wait}
        anchor = wait
        for alias in self._aliases(result):
            late = [user for user in alias.users if user is not wait and self.position[user] >= self.position[before]]
            if not late:
                continue
            if alias not in replaced:
                anchor = self._copy_view(alias, replaced, anchor)
            for user in late:
                user.replace_input_with(alias, replaced[alias])

    def _copy_view(self, alias: fx.Node, replaced: dict[fx.Node, fx.Node], anchor: fx.Node) -> fx.Node:
        """``alias`` over the waited tensor, with the views between them; returns the last node added."""
        base: Any = alias.args[0]
        if base not in replaced:
            anchor = self._copy_view(base, replaced, anchor)
        with self.graph.inserting_after(anchor):
            copy = self.graph.node_copy(alias, lambda n: replaced.get(n, n))
        self.position[copy] = self.position[replaced[base]]
        replaced[alias] = copy
        return copy

    def _aliases(self, result: fx.Node) -> list[fx.Node]:
        """``result`` and all views of it, bases first."""
        found = [result]
        for alias in found:
            found.extend(user for user in alias.users if is_view(user) and user.args[0] is alias and user not in found)
        return found
