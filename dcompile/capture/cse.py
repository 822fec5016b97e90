"""Merging equal computations in the joint graph, so that the partitioner does not save the same value twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from dcompile.capture.comm import communication


def merge_equal(gm: fx.GraphModule) -> int:
    """Replace every node that computes what an earlier one computes; returns how many went.

    Left alone: communication (two launches are two launches, on every rank), random and mutating ops, uninitialised
    memory, and whatever shares storage with an output (equal outputs are distinct tensors in eager).
    """
    kept: dict[Any, fx.Node] = {}
    outputs = _output_storages(gm)
    merged = 0
    for node in list(gm.graph.nodes):
        if not _mergeable(node) or _storage(node) in outputs:
            continue
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        key = (node.target, tuple((type(leaf), _identity(leaf)) for leaf in leaves), spec)
        try:
            earlier = kept.setdefault(key, node)
        except TypeError:  # an unhashable literal
            continue
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            gm.graph.erase_node(node)
            merged += 1
    gm.recompile()
    return merged


def _mergeable(node: fx.Node) -> bool:
    if node.op != "call_function" or communication(node) or node.is_impure():
        return False
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema
    if schema.is_mutable or not schema.name.startswith(("aten::", "prims::")):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or "empty" in schema.name:
        return False
    return isinstance(node.meta.get("val"), torch.Tensor)


def _identity(leaf: Any) -> Any:
    return repr(leaf) if isinstance(leaf, float) else leaf  # 0.0 == -0.0, nan != nan


def _storage(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:
        return None


def _output_storages(gm: fx.GraphModule) -> set[Any]:
    found: set[Any] = set()
    for node in gm.graph.nodes:
        if node.op == "output":
            found.update(_storage(source) for source in node.all_input_nodes)
    found.discard(None)
    return found
