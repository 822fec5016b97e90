"""Convolutions on GPUs in the layout their kernels work in: channels last.

Matrix units take channels-last operands. A library kernel that is given others converts them before and after every
call, which on an H100 is a fifth of a ResNet-50 training step. Here the operands are asked for in that layout once;
PyTorch's ops then keep it from one convolution to the next, and conversions that remain join the kernels around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

CONVOLUTIONS = frozenset({torch.conv2d, torch.conv_transpose2d})
GROUPS = 6
"""Position of ``groups`` among the arguments of both."""


def prefer_channels_last(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Ask for channels-last operands of the 16-bit two-dimensional convolutions of a CUDA graph, in place.

    Results that leave the graph keep the layout they had. Grouped convolutions take what they get.
    """
    if not _on_cuda(example_inputs) or not _in_16_bits(gm, example_inputs):
        return
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in CONVOLUTIONS]
    found = [node for node in found if _groups(node) == 1 and len(node.args) >= 2]
    if not found:
        return
    for node in found:
        with gm.graph.inserting_before(node):
            operands = [_laid_out(gm, operand, torch.channels_last) for operand in node.args[:2]]
        node.args = (*operands, *node.args[2:])
    _restore_outputs(gm)
    gm.graph.lint()
    gm.recompile()


def _laid_out(gm: fx.GraphModule, operand: Any, layout: torch.memory_format) -> fx.Node:
    return gm.graph.call_method("contiguous", (operand,), {"memory_format": layout})


def _groups(node: fx.Node) -> Any:
    return node.kwargs.get("groups", node.args[GROUPS] if len(node.args) > GROUPS else 1)


def restore_gradients(joint: fx.GraphModule, forward_outputs: int) -> None:
    """Gradients of contiguous inputs are made contiguous in the joint graph: autograd would copy others once more."""
    output = joint.graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    primals = [n for n in joint.graph.find_nodes(op="placeholder") if n.name.startswith("primals")]
    for at, primal in zip(range(forward_outputs, len(results)), primals, strict=False):
        gradient, value = results[at], primal.meta.get("val")
        if not isinstance(gradient, fx.Node) or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        found = gradient.meta.get("val")
        if value.is_contiguous() and isinstance(found, torch.Tensor) and not found.is_contiguous():
            with joint.graph.inserting_before(output):
                whole: dict[str, Any] = {"memory_format": torch.contiguous_format}
                copy = joint.graph.call_function(torch.ops.aten.clone.default, (gradient,), whole)
            copy.meta = {**gradient.meta, "val": found.contiguous()}
            results[at] = copy
    output.args = (type(output.args[0])(results),)


def _on_cuda(example_inputs: Sequence[Any]) -> bool:
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    return any(x.device.type == "cuda" for x in tensors)


def _in_16_bits(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether autocast is on, around the graph or inside it, or an operand has 16 bits."""
    entered = any(node.op == "call_function" and "autocast" in str(node.target) for node in gm.graph.nodes)
    narrow = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in example_inputs)
    return entered or narrow or torch.is_autocast_enabled("cuda")


def _restore_outputs(gm: fx.GraphModule) -> None:
    """Outputs of four dimensions that were contiguous are made contiguous again."""
    output = gm.graph.find_nodes(op="output")[0]

    def restored(item: Any) -> Any:
        value = item.meta.get("example_value") if isinstance(item, fx.Node) else None
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or not value.is_contiguous():
            return item
        with gm.graph.inserting_before(output):
            return _laid_out(gm, item, torch.contiguous_format)

    output.args = (fx.node.map_arg(output.args[0], restored),)
