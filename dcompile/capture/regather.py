"""Parameters that are stored in shards: when their gathers run, and which of them run again in the backward graph.

A gather of a parameter is marked where it is written (``GATHER`` below, through ``torch.fx.traceback.annotate``). The
chain from the shard to what the model reads (cast, gather, wait, views) depends on the shard alone, so it can stand
anywhere: directly before its first reader, and once more in the backward graph instead of keeping the gathered
parameter alive in between. FSDP does that with ``reshard_after_forward`` (Zhao et al., VLDB 2023).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from dcompile.capture.comm import communication
from dcompile.capture.outputs import edit_output, edit_outputs, outputs_of

GATHER = "dcompile_gather"
"""Key of the annotation on a gather; its value is one of the two below."""
KEEP, AGAIN = "keep", "again"
"""Whether the gathered parameter is kept for the backward pass, or gathered again there."""


def gather_before_use(gm: fx.GraphModule) -> None:
    """Move each gather chain directly before its first reader, in place."""
    chain = _chains(gm)
    if not chain:
        return
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node not in chain:
            _place(node, chain, placed, order)
    for node in chain:  # chains nobody reads
        _place(node, chain, placed, order)
    output = next(node for node in order if node.op == "output")
    order = [node for node in order if node is not output]
    for before, node in itertools.pairwise(order):
        before.append(node)
    gm.recompile()


def gather_again(fwd: fx.GraphModule, bwd: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Save shards instead of gathered parameters, and gather again in the backward graph; both change in place.

    Args:
        num_fwd_outputs: outputs of ``fwd`` in front of the saved values.

    Returns:
        How many saved values were replaced.
    """
    chain = _chains(fwd)
    inputs = {node.name: node for node in bwd.graph.nodes if node.op == "placeholder"}
    clones: dict[fx.Node, fx.Node] = {}
    replaced = 0
    for saved in dict.fromkeys(outputs_of(fwd)[num_fwd_outputs:]):
        if saved not in chain or not _all_marked(saved, chain, AGAIN) or saved.name not in inputs:
            continue
        shard, received = _input_of(saved, chain), inputs.pop(saved.name)
        place = outputs_of(fwd).index(saved, num_fwd_outputs)
        if shard.name in inputs:
            edit_outputs(fwd, partial(_without, place))
        else:
            edit_output(fwd, place, shard)
            with bwd.graph.inserting_before(received):
                inputs[shard.name] = bwd.graph.placeholder(shard.name)
            inputs[shard.name].meta = dict(shard.meta)
        clones[shard] = inputs[shard.name]
        with bwd.graph.inserting_before(next(n for n in bwd.graph.nodes if n.op != "placeholder")):
            received.replace_all_uses_with(_clone(saved, bwd, clones))
        bwd.graph.erase_node(received)
        replaced += 1
    if replaced:
        for gm in (fwd, bwd):
            gm.graph.lint()
            gm.recompile()
    return replaced


def _without(position: int, entries: list[Any]) -> list[Any]:
    return entries[:position] + entries[position + 1 :]


def _chains(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes between an input and the readers of a marked gather that depend on that one input, gather included."""
    root: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            root[node] = node
        elif communication(node) or (node.op == "call_function" and not node.is_impure() and not _random(node)):
            sources = {root.get(source) for source in node.all_input_nodes}
            if len(sources) == 1 and None not in sources:
                root[node] = next(source for source in sources if source is not None)
    marked = {node for node in gm.graph.nodes if _mark(node) and node in root}
    feeding = _closure(marked, lambda node: node.all_input_nodes)
    reading = _closure(marked, lambda node: [user for user in node.users if user in root])
    members = {node for node in (feeding | reading) if node.op != "placeholder" and node in root}
    return {node: None for node in gm.graph.nodes if node in members}


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _closure(start: Iterable[fx.Node], step: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(step(node))
    return found


def _mark(node: fx.Node) -> str | None:
    custom: Any = node.meta.get("custom")
    value = custom.get(GATHER) if isinstance(custom, dict) else None
    return str(value) if value is not None and communication(node).startswith("all_gather") else None


def _all_marked(node: fx.Node, chain: dict[fx.Node, None], mark: str) -> bool:
    """Whether ``node`` comes from gathers that all carry ``mark``."""
    marks = {_mark(n) for n in _closure([node], lambda n: [s for s in n.all_input_nodes if s in chain])} - {None}
    return marks == {mark}


def _input_of(node: fx.Node, chain: dict[fx.Node, None]) -> fx.Node:
    """The input at the end of the chain."""
    while node in chain:
        node = node.all_input_nodes[0]
    return node


def _place(node: fx.Node, chain: dict[fx.Node, None], placed: set[fx.Node], order: list[fx.Node]) -> None:
    """Append ``node`` to ``order``, the chain it reads in front of it."""
    if node in placed:
        return
    for source in node.all_input_nodes:
        if source in chain:
            _place(source, chain, placed, order)
    placed.add(node)
    order.append(node)


def _clone(node: fx.Node, bwd: fx.GraphModule, clones: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in clones:
        for source in node.all_input_nodes:
            _clone(source, bwd, clones)
        clones[node] = bwd.graph.node_copy(node, lambda source: clones[source])
    return clones[node]
