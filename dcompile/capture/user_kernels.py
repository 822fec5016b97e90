"""Triton kernels in a traced graph: PyTorch names them by their place in a table of its own; here they are objects."""

from __future__ import annotations

from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

KERNEL = "dcompile_kernel"
"""Key of ``node.meta`` under which the next stages find the kernel and its constant arguments."""
NAMES = ("triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation")


def attach_kernels(gm: fx.GraphModule) -> None:
    """Put every launched kernel into the meta of the node that launches it."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in NAMES:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            node.meta[KERNEL] = (kernel, dict(kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])))
