"""Splitting the joint graph into forward and backward."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

from dcompile.capture.channels_last import restore_gradients
from dcompile.capture.comm import acts, collectives_have_effects, communication, eliminate_dead_code
from dcompile.capture.cse import merge_equal
from dcompile.capture.fewer_collectives import add_before_reducing, gather_once, move_blocks
from dcompile.capture.origins import mark_sources
from dcompile.capture.outputs import edit_outputs, outputs_of
from dcompile.capture.regather import gather_again

RETURNED = "dcompile_returned"
"""In a forward graph's ``meta``: how many of its outputs, from the first, are not only saved for the backward."""

_ACCEPTED = frozenset(inspect.signature(min_cut_rematerialization_partition).parameters)


def partition(
    joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graph of ``joint``; cheap forward work is recomputed where that saves memory.

    PyTorch's min-cut partitioner decides what to save. It drops actions that reach no output; here such nodes
    are outputs while it runs and lose that role afterwards, so each is kept in the graph it belongs to. Collectives are
    never recomputed.
    """
    mark_sources(joint)
    merge_equal(joint)
    if gather_once(joint):
        move_blocks(joint)
        merge_equal(joint)
    add_before_reducing(joint)
    _save_random_values(joint)
    restore_gradients(joint, num_fwd_outputs)
    forward, backward = _unused_actions(joint)
    _add_outputs(joint, num_fwd_outputs, forward, backward)
    known = {name: value for name, value in options.items() if name in _ACCEPTED}
    with functorch_config.patch(cse=False), collectives_have_effects(False):
        fwd, bwd = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs + len(forward), **known
        )
    fwd, bwd = (LazyGraphModule.from_graphmodule(gm) for gm in (fwd, bwd))  # their Python code is never run
    _drop_outputs(fwd, num_fwd_outputs, num_fwd_outputs + len(forward))
    total = len(outputs_of(bwd))
    _drop_outputs(bwd, total - len(backward), total)
    fwd.meta[RETURNED] = num_fwd_outputs
    gather_again(fwd, bwd, num_fwd_outputs)
    for gm in (fwd, bwd):
        eliminate_dead_code(gm)
        gm.recompile()
    return fwd, bwd


def _save_random_values(joint: fx.GraphModule) -> None:
    """Take random ops out of activation checkpointing: their values are saved.

    To draw them again PyTorch would wrap each in an op that saves and restores the generator's state, which costs a
    synchronisation and hides the op from the lowering.
    """
    for node in joint.graph.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            for tagged in (node, *(user for user in node.users if user.target is operator.getitem)):
                tagged.meta.pop("recompute", None)


def _unused_actions(joint: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that hold alive everything that acts and no output needs: those of the forward, those of the backward."""
    live: set[fx.Node] = set()
    for node in reversed(joint.graph.nodes):
        if node.op == "output" or any(user in live for user in node.users):
            live.add(node)
    backward_nodes: set[fx.Node] = set()
    forward: list[fx.Node] = []
    backward: list[fx.Node] = []
    for node in list(joint.graph.nodes):
        if _starts_backward(node) or any(source in backward_nodes for source in node.all_input_nodes):
            backward_nodes.add(node)
        if acts(node) and node not in live and not (communication(node) and _feeds_communication(node)):
            (backward if node in backward_nodes else forward).append(_tensor_of(node))
    return forward, backward


def _starts_backward(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return str(node.target).startswith("tangents")
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def _feeds_communication(node: fx.Node) -> bool:
    pending = list(node.users)
    seen: set[fx.Node] = set()
    while pending:
        user = pending.pop()
        if communication(user):
            return True
        if user not in seen:
            seen.add(user)
            pending.extend(user.users)
    return False


def _tensor_of(node: fx.Node) -> fx.Node:
    """``node`` itself, or one tensor of it if it gives a list."""
    value = node.meta.get("val")
    if not isinstance(value, (list, tuple)):
        return node
    for user in node.users:
        if user.target is operator.getitem:
            return user
    first = next(n for n, item in enumerate(value) if item is not None)
    with node.graph.inserting_after(node):
        item: fx.Node = node.graph.call_function(operator.getitem, (node, first))
    item.meta = {**node.meta, "val": value[first]}
    return item


def _add_outputs(joint: fx.GraphModule, num_fwd_outputs: int, forward: list[fx.Node], backward: list[fx.Node]) -> None:
    def add(entries: list[Any]) -> list[Any]:
        own = bool(entries) and all(entry is None or isinstance(entry, fx.Node) for entry in entries)
        first = forward if own else entries[:1] * len(forward)
        last = backward if own else entries[:1] * len(backward)
        return [*entries[:num_fwd_outputs], *first, *entries[num_fwd_outputs:], *last]

    if forward or backward:
        edit_outputs(joint, add)
        joint.recompile()


def _drop_outputs(gm: fx.GraphModule, first: int, last: int) -> None:
    if first < last:
        edit_outputs(gm, lambda entries: entries[:first] + entries[last:])
