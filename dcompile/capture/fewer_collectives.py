"""Collectives of tensor parallel layers that one can do the work of several, and moves of blocks as plain views.

Layers that read the same sharded activation gather it once each, and their gradients are reduced one by one before they
are added. Every rank runs the same program, so all ranks drop the same launches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dcompile.capture.comm import communication, is_wait
from dcompile.capture.origins import SOURCE

aten = torch.ops.aten
GATHERS = frozenset({"all_gather_into_tensor"})
SUMS = {"all_reduce": 1, "reduce_scatter_tensor": 1}
"""Reductions and the position of their operator."""


def gather_once(gm: fx.GraphModule) -> int:
    """Let equal gathers of one tensor be one, in place; returns how many went."""
    kept: dict[Any, fx.Node] = {}
    returned = {source for node in gm.graph.nodes if node.op == "output" for source in node.all_input_nodes}
    gone = 0
    for node in list(gm.graph.nodes):
        if communication(node) not in GATHERS or node.meta.get("custom"):
            continue
        waits = list(node.users)
        if len(waits) != 1 or not is_wait(waits[0]) or waits[0] in returned:
            continue
        earlier = kept.setdefault((node.target, node.args), node)
        if earlier is not node:
            waits[0].replace_all_uses_with(next(iter(earlier.users)))
            gm.graph.erase_node(waits[0])
            gm.graph.erase_node(node)
            gone += 1
    return gone


def add_before_reducing(gm: fx.GraphModule) -> int:
    """The sum of two reductions is one reduction of the sum, in place; returns how many went.

    Sums round in another order then, as reductions may in any case.
    """
    gone = 0
    for node in list(gm.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        reductions = [_reduction_behind(source) for source in node.args]
        if None in reductions or len(set(reductions)) != 2:
            continue
        first, second = reductions
        if first.target is not second.target or first.args[1:] != second.args[1:] or not _alike(first, second):
            continue
        with gm.graph.inserting_before(node):
            total = _call(gm, aten.add.Tensor, (first.args[0], second.args[0]), node)
            reduced = _call(gm, first.target, (total, *first.args[1:]), first)
            wait = _call(gm, torch.ops._c10d_functional.wait_tensor.default, (reduced,), first)
        waits = list(node.all_input_nodes)
        node.replace_all_uses_with(wait)
        for old in (node, *waits, first, second):
            gm.graph.erase_node(old)
        gone += 1
    return gone


def _reduction_behind(source: Any) -> Any:
    """The reduction that ``source`` waits for, if nobody else reads either."""
    if not isinstance(source, fx.Node) or not is_wait(source) or len(source.users) != 1:
        return None
    launch = source.args[0]
    if not isinstance(launch, fx.Node) or communication(launch) not in SUMS or len(launch.users) != 1:
        return None
    return launch if launch.args[SUMS[communication(launch)]] in ("sum", "avg") else None


def _alike(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.args[0].meta["val"], second.args[0].meta["val"]  # type: ignore[union-attr]
    return bool(a.shape == b.shape and a.dtype is b.dtype)


def move_blocks(gm: fx.GraphModule) -> int:
    """``cat(split(x, equal, a), d)`` moves a dimension: a view, a permutation and a copy, in place; returns how many.

    That is how the gathered dimension is put where it belongs. As one permuted read it has no choice in its loop.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        if node.target is not aten.cat.default or node.kwargs:
            continue
        found = _whole_split(node)
        if found is None:
            continue
        source, blocks, split_dim = found
        shape = list(source.meta["val"].shape)
        to = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        if to == split_dim:
            continue
        apart = [*shape[:split_dim], blocks, shape[split_dim] // blocks, *shape[split_dim + 1 :]]
        rest = [d for d in range(len(apart)) if d != split_dim]
        order = [*rest[:to], split_dim, *rest[to:]]
        with gm.graph.inserting_before(node):
            seen = _call(gm, aten.view.default, (source, apart), node)
            turned = _call(gm, aten.permute.default, (seen, order), node)
            copy = _call(gm, aten.clone.default, (turned,), node, memory_format=torch.contiguous_format)
            result = _call(gm, aten.view.default, (copy, list(node.meta["val"].shape)), node)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        changed += 1
    if changed:
        gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op != "call_function" or not _is_split_part(n))
    return changed


def _is_split_part(node: fx.Node) -> bool:
    return node.target in (aten.split_with_sizes.default, aten.split.Tensor, operator.getitem)


def _whole_split(cat: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What was split into the parts of ``cat``, all of them in order and equally large: source, parts, dimension."""
    parts: Any = cat.args[0]
    if len(parts) < 2 or any(not isinstance(p, fx.Node) or p.target is not operator.getitem for p in parts):
        return None
    split = parts[0].args[0]
    if split.target not in (aten.split_with_sizes.default, aten.split.Tensor):
        return None
    if [(part.args[0], part.args[1]) for part in parts] != [(split, n) for n in range(len(parts))]:
        return None
    source, value = split.args[0], split.args[0].meta["val"]
    dim = (split.args[2] if len(split.args) > 2 else 0) % value.dim()
    sizes = [part.meta["val"].shape[dim] for part in parts]
    static = all(isinstance(n, int) for n in (*value.shape, *sizes))  # symbolic ones have no hash in PyTorch 2.11
    if not static or not value.is_contiguous() or set(sizes) != {value.shape[dim] // len(parts)}:
        return None
    return (source, len(parts), dim) if value.shape[dim] % len(parts) == 0 and value.numel() else None


def _call(
    gm: fx.GraphModule, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node, **options: Any
) -> fx.Node:
    """A new node at the insertion point, with the value it has while tracing and the origin of ``like``."""
    node: fx.Node = gm.graph.call_function(target, args, options)
    kept = ("stack_trace", "nn_module_stack", "partitioner_tag", "seq_nr", SOURCE)
    node.meta = {key: like.meta[key] for key in kept if key in like.meta}
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*fx.map_arg(args, lambda source: source.meta["val"]), **options)
    return node
