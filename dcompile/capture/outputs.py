"""Editing what an fx graph returns, together with the lists PyTorch keeps beside its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

_BESIDE = ("desc", "output_stack_traces")
"""Keys of the output node's meta under which PyTorch keeps one entry for each output."""


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    output: fx.Node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return output


def outputs_of(gm: fx.GraphModule) -> list[Any]:
    """What the graph returns, one entry a position."""
    values: Any = output_node(gm).args[0]
    return list(values)


def edit_outputs(gm: fx.GraphModule, edit: Callable[[list[Any]], list[Any]]) -> None:
    """Apply ``edit`` to the list of outputs and to the lists PyTorch keeps beside it."""
    output = output_node(gm)
    values = outputs_of(gm)
    for key in _BESIDE:
        entries = output.meta.get(key)
        if isinstance(entries, (list, tuple)) and len(entries) == len(values):
            output.meta[key] = edit(list(entries))
    output.args = (tuple(edit(values)),)


def edit_output(gm: fx.GraphModule, position: int, value: Any) -> None:
    """Return ``value`` at ``position``."""
    values = outputs_of(gm)
    values[position] = value
    output_node(gm).args = (tuple(values),)
