"""Which ops AOTAutograd breaks up while tracing, and which stay whole.

The table is PyTorch's core ATen decompositions with two changes. ``KEPT`` ops stay single ops because a library call or
one lowering rule of ours does better than the pieces. ``BROKEN_UP`` ops are not part of the core table, but are cheap
memory-bound work: in pieces they fuse with their neighbours and the partitioner may recompute any one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import _decomp
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload, OpOverloadPacket

from dcompile.capture.pieces import channels_last_unpooling, flat_indexing, random_pieces, view_copies

aten = torch.ops.aten

Table = dict[Any, Callable[..., Any]]

KEPT: dict[str, str] = {
    "addmm": "one library call with the bias in its epilogue",
    "baddbmm": "one library call with the addend in its epilogue",
    "mv": "library matrix-vector product instead of a broadcast multiply and a row sum",
    "dot": "library dot product",
    "vdot": "library dot product; conjugates its first operand",
    "_scaled_dot_product_flash_attention_for_cpu": "library kernel that never materialises the score matrix",
    "_scaled_dot_product_flash_attention": "library kernel that never materialises the score matrix",
    "_scaled_dot_product_efficient_attention": "library kernel that never materialises the score matrix",
    "_scaled_dot_product_cudnn_attention": "library kernel that never materialises the score matrix",
    "embedding_dense_backward": "one scatter-add lowering rule; the pieces make a masked copy of the gradient",
    "native_dropout": "the lowering draws from its own seeded counter-based generator, equal on recomputation",
    "convolution_backward": "library call that returns all three gradients from one setup",
    "select_scatter": "a write into a view where the result replaces its operand",
    "max_pool2d_with_indices": "one fold over the window; the pieces copy every window first",
    "max_pool3d_with_indices": "one fold over the window; the pieces copy every window first",
    "_adaptive_avg_pool2d": "one fold over the window",
    "adaptive_max_pool2d": "one fold over the window",
    "adaptive_max_pool3d": "one fold over the window",
    "max_unpool3d": "one scatter",
    "index_add": "one scatter-add lowering rule, accumulating in one pass",
    "bernoulli": "drawn by the lowering's generator",
}
"""Op names that stay whole, out of the table even where the core table has them, each with the reason."""

BROKEN_UP: dict[str, str] = {
    "_softmax": "a maximum, an exponential, a sum and a division, all fusible with producer and consumer",
    "_log_softmax": "the same with a logarithm",
    "_softmax_backward_data": "one product, one row sum, one difference",
    "_log_softmax_backward_data": "one row sum, one exponential, one difference",
    "native_layer_norm": "mean and variance, then pointwise work that fuses with what follows",
    "native_layer_norm_backward": "row and column sums of pointwise work",
    "native_group_norm": "mean and variance, then pointwise work",
    "native_group_norm_backward": "sums of pointwise work",
    "native_batch_norm": "mean and variance, then pointwise work",
    "native_batch_norm_backward": "sums of pointwise work",
    "_native_batch_norm_legit": "mean and variance, then pointwise work; running statistics become plain writes",
    "_native_batch_norm_legit_no_training": "pointwise work on the running statistics",
    "_native_batch_norm_legit_functional": "mean and variance, then pointwise work",
    "_batch_norm_with_update_functional": "mean and variance, then pointwise work",
    "gelu": "pointwise",
    "gelu_backward": "pointwise",
    "silu": "pointwise",
    "silu_backward": "pointwise",
    "elu": "pointwise",
    "leaky_relu": "pointwise",
    "hardtanh": "pointwise",
    "threshold_backward": "pointwise",
    "native_dropout_backward": "pointwise",
    "nll_loss_forward": "a gather and a mean",
    "nll_loss_backward": "a scatter and a product",
    "aminmax": "two reductions over one read",
    "addcmul": "pointwise",
    "addcdiv": "pointwise",
    "lerp": "pointwise",
    "index_select": "one gather",
    "linalg_vector_norm": "a power sum and a root",
    "batch_norm_backward": "sums of pointwise work",
    "dist": "a difference and a norm",
    "ldexp": "pointwise",
    "exponential": "pointwise work on uniform numbers",
    "cauchy": "pointwise work on uniform numbers",
    "log_normal": "pointwise work on normal numbers",
    "rrelu_with_noise_backward": "pointwise",
    "grid_sampler_2d": "gathers and their weights",
    "_fused_rms_norm": "a mean of squares, then pointwise work",
    "_fused_rms_norm_backward": "row sums of pointwise work",
}
"""Op names decomposed on top of the core table, each with the reason. A name this torch version lacks is skipped."""


def decompositions() -> Table:
    """The table AOTAutograd gets: op overload -> Python function that computes it from simpler ops."""
    # The dispatcher breaks up composite ops before this table is asked; it is a third the size without them.
    core = getattr(_decomp, "_core_aten_decompositions_post_autograd", core_aten_decompositions)
    table: Table = dict(core())
    for overload in _overloads(KEPT):
        table.pop(overload, None)
    table.update(get_decompositions(list(_overloads(BROKEN_UP))))
    table.update(view_copies() | flat_indexing() | random_pieces() | channels_last_unpooling())
    return table


def _overloads(names: Iterable[str]) -> list[OpOverload]:
    found: list[OpOverload] = []
    for name in sorted(names):
        packet = getattr(aten, name, None)
        if isinstance(packet, OpOverloadPacket):
            listed: Any = packet  # overloads() carries no types
            found.extend(getattr(packet, overload) for overload in listed.overloads())
    return found
