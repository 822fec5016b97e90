"""Parameters that are stored in shards: when their gathers run, and which of them run again in the backward graph.

A gather of a parameter is marked where it is written (``GATHER`` below, through ``torch.fx.traceback.annotate``). The
chain from the shard to what the model reads (cast, gather, wait, views) depends on the shard alone, so it can stand
anywhere: directly before its first reader, and once more in the backward graph instead of keeping the gathered
parameter alive in between. FSDP does that with ``reshard_after_forward`` (Zhao et al., VLDB 2023). In between lies a
middle way: each rank keeps a piece, and the ranks of a smaller group, close to each other, put it together again
(``torch.ops.dcompile.keep_piece`` marks where).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from dcompile.capture.comm import communication
from dcompile.capture.keeping import kept_within
from dcompile.capture.origins import SOURCE
from dcompile.capture.outputs import edit_output, edit_outputs, outputs_of

aten = torch.ops.aten

GATHER = "dcompile_gather"
"""Key of the annotation on a gather; its value is one of the two below."""
KEEP, AGAIN, PIECE = "keep", "again", "piece"
"""Whether the gathered parameter is kept for the backward pass, gathered again there, or kept in pieces and gathered
from these. As a value of the annotation the last one is ``AGAIN`` too: the op ``keep_piece`` behind it says how."""

BUDGET = "dcompile_peak_memory_bytes"
"""Key of the annotation that says how many bytes a step may use, as text; then what is kept follows that instead."""

_LIBRARY: Any = cast(Any, torch.library.Library)("dcompile", "FRAGMENT")
_LIBRARY.define("keep_piece(Tensor stacked, Tensor position, int pieces, str group) -> Tensor")


def _keep_piece(stacked: torch.Tensor, position: torch.Tensor, pieces: int, group: str) -> torch.Tensor:
    """``stacked`` itself, of which the rank with number ``position`` (int64, one element) of ``group`` may keep one of
    ``pieces`` equal parts of the first dimension."""
    return stacked.clone()


_LIBRARY.impl("keep_piece", _keep_piece, "CompositeExplicitAutograd")
torch.library.register_fake("dcompile::keep_piece", lambda stacked, *_: torch.empty_like(stacked), lib=_LIBRARY)


def gather_before_use(gm: fx.GraphModule) -> None:
    """Move each gather chain directly before its first reader, in place. Marks of kept pieces go."""
    for node in list(gm.graph.nodes):
        if _piece(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
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
    pieces: dict[fx.Node, fx.Node] = {}
    again = _gathered_again(fwd, bwd, chain, outputs_of(fwd)[num_fwd_outputs:])
    front = next(node for node in bwd.graph.nodes if node.op != "placeholder")
    replaced = 0
    for saved in dict.fromkeys(outputs_of(fwd)[num_fwd_outputs:]):
        if saved not in again or saved.name not in inputs:
            continue
        received = inputs.pop(saved.name)
        place = outputs_of(fwd).index(saved, num_fwd_outputs)
        marker = _marker_of(saved, chain)
        source = _input_of(saved, chain) if marker is None else _piece_of(marker, fwd, pieces)
        if source.name in inputs:
            edit_outputs(fwd, partial(_without, place))
        else:
            edit_output(fwd, place, source)
            with bwd.graph.inserting_before(received):
                inputs[source.name] = bwd.graph.create_node("placeholder", source.name, name=source.name)
            inputs[source.name].meta = dict(source.meta)
        clones[source] = inputs[source.name]
        with bwd.graph.inserting_before(front):
            if marker is not None and marker not in clones:
                clones[marker] = _gathered_from_pieces(marker, inputs[source.name], bwd)
            received.replace_all_uses_with(_clone(saved, bwd, clones))
        bwd.graph.erase_node(received)
        replaced += 1
    if replaced:
        for gm in (fwd, bwd):
            gm.graph.lint()
            gm.recompile()
    return replaced


def _piece(node: fx.Node) -> bool:
    return node.target is torch.ops.dcompile.keep_piece.default


def _marker_of(saved: fx.Node, chain: dict[fx.Node, None]) -> fx.Node | None:
    """The mark of a kept piece that ``saved`` is computed from."""
    found = _closure([saved], lambda node: [source for source in _sources(node) if source in chain])
    return next((node for node in found if _piece(node)), None)


def _piece_of(marker: fx.Node, fwd: fx.GraphModule, pieces: dict[fx.Node, fx.Node]) -> fx.Node:
    """What this rank keeps, computed in the forward graph. Which piece it is is known at run time: all ranks run the
    same program."""
    if marker not in pieces:
        arguments: Any = marker.args
        stacked, position, count, _ = arguments
        rows, *rest = stacked.meta["val"].shape
        with fwd.graph.inserting_after(marker):
            table = _call(fwd, aten.view.default, (stacked, [count, rows // count, *rest]), marker)
        with fwd.graph.inserting_after(table):
            chosen = _call(fwd, aten.index_select.default, (table, 0, position), marker)
        with fwd.graph.inserting_after(chosen):
            pieces[marker] = _call(fwd, aten.view.default, (chosen, [rows // count, *rest]), marker)
    return pieces[marker]


def _gathered_from_pieces(marker: fx.Node, piece: fx.Node, bwd: fx.GraphModule) -> fx.Node:
    """What ``marker`` stands for, put together in the backward graph."""
    ops = torch.ops._c10d_functional
    gather = _call(bwd, ops.all_gather_into_tensor.default, (piece, *marker.args[2:]), marker)
    gather.meta["custom"] = {GATHER: AGAIN}
    return _call(bwd, ops.wait_tensor.default, (gather,), marker)


def _call(gm: fx.GraphModule, target: OpOverload, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A new node at the insertion point, with the value it has while tracing and the origin of ``like``."""
    node: fx.Node = gm.graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack", SOURCE) if key in like.meta}
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*fx.map_arg(args, lambda source: source.meta["val"]))
    return node


def _sources(node: fx.Node) -> list[fx.Node]:
    """What ``node`` computes from: the mark of a kept piece from the parameter alone."""
    return node.all_input_nodes[:1] if _piece(node) else node.all_input_nodes


def _without(position: int, entries: list[Any]) -> list[Any]:
    return entries[:position] + entries[position + 1 :]


def _chains(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes between an input and the readers of a marked gather that depend on that one input, gather included."""
    root: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            root[node] = node
        elif communication(node) or (node.op == "call_function" and not node.is_impure() and not _random(node)):
            sources = {root.get(source) for source in _sources(node)}
            if len(sources) == 1 and None not in sources:
                root[node] = next(source for source in sources if source is not None)
    marked = {node for node in gm.graph.nodes if _mark(node) and node in root}
    feeding = _closure(marked, _sources)
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


def _gathered_again(
    fwd: fx.GraphModule, bwd: fx.GraphModule, chain: dict[fx.Node, None], saved: list[Any]
) -> set[fx.Node]:
    """Those of ``saved`` that come from gathers and are not kept: as they are marked, or as the budget says."""
    wanted = {node for node in saved if node in chain and _all_marked(node, chain, AGAIN)}
    budgets = {node.meta["custom"].get(BUDGET) for node in chain if _mark(node)} - {None}
    if not budgets:
        return wanted
    gathered = wanted | {node for node in saved if node in chain and _all_marked(node, chain, KEEP)}
    in_order = [node for node in fwd.graph.nodes if node in gathered]
    return gathered - kept_within(min(map(int, budgets)), fwd, bwd, in_order)


def _all_marked(node: fx.Node, chain: dict[fx.Node, None], mark: str) -> bool:
    """Whether ``node`` comes from gathers that all carry ``mark``."""
    marks = {_mark(n) for n in _closure([node], lambda n: [s for s in _sources(n) if s in chain])} - {None}
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
