"""Which gathered parameters stay for the backward pass when a step may use so many bytes and no more.

All of them cost the same to keep, byte for byte, and save the same to gather again; the last ones of the forward pass
are the first ones of the backward pass, so they stay alive for the shortest time and are kept first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from dcompile.capture.comm import is_view, is_wait


def kept_within(budget_bytes: int, fwd: fx.GraphModule, bwd: fx.GraphModule, saved: Sequence[fx.Node]) -> set[fx.Node]:
    """The gathered values among ``saved`` that fit into the budget, the last ones of ``fwd`` first.

    Args:
        budget_bytes: for parameters, saved values and everything the backward pass computes, gradients included.
        saved: gathered values, in the order of ``fwd``; all else that is saved stays in any case.
    """
    inputs = {node: None for node in fwd.graph.nodes if node.op == "placeholder"}
    received = {node.name for node in bwd.graph.nodes if node.op == "placeholder"}
    others = [node for node in fwd.graph.nodes if node.name in received and node not in saved and node not in inputs]
    largest = max((nbytes(node) for node in saved), default=0)
    used = sum(map(nbytes, (*inputs, *others))) + working_bytes(bwd) + 2 * largest  # one is read, one on its way
    kept: set[fx.Node] = set()
    for node in reversed(saved):
        if used + nbytes(node) > budget_bytes:
            break
        used += nbytes(node)
        kept.add(node)
    return kept


def nbytes(node: fx.Node) -> int:
    """Bytes of the tensor that ``node`` gives; 0 if it gives none, or one whose size is not known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in value.shape):
        return 0
    return value.numel() * value.element_size()


def working_bytes(gm: fx.GraphModule) -> int:
    """Most bytes alive at once that ``gm`` has computed, in its order, before anything is fused."""
    root: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(gm.graph.nodes):
        shares = (is_view(node) or is_wait(node)) and isinstance(node.args[0], fx.Node)
        root[node] = root[node.args[0]] if shares else node  # type: ignore[index]
        for source in (node, *node.all_input_nodes):
            last[root[source]] = position
    ending: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        ending.setdefault(position, []).append(node)
    alive = most = 0
    for position, node in enumerate(gm.graph.nodes):
        if node.op == "call_function" and root[node] is node:
            alive += nbytes(node)
        most = max(most, alive)
        alive -= sum(map(nbytes, _computed(ending.get(position, ()))))
    return most


def _computed(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.op == "call_function"]
