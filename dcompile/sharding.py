"""What happens to one fully sharded parameter: gathered from shards, its gradient reduced to a shard.

Everything here is traced: collectives are functional ops, so that they become nodes of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.traceback import annotate

from dcompile.capture.regather import AGAIN, BUDGET, GATHER, KEEP, PIECE


@dataclass(frozen=True)
class Sharding:
    """How one parameter is stored and communicated.

    Attributes:
        rows: extent of the sharded dimension when gathered.
        dim: the sharded dimension.
        group, world: process group name and number of ranks that hold the shards.
        reduce_group: process group name of the reductions; the same ranks.
        replicas, copies: process group name and number of ranks that hold the same shard; ``""`` and 1 without HSDP.
        pieces, piece_group: between forward and backward the parameter is kept in this many pieces by the ranks of this
            group; 1 and ``""`` if there is no such group.
        param_dtype: what is gathered and computed with.
        reduce_dtype: what gradients are reduced in.
        divisor: gradients are summed over all ranks and divided by it; as text, because a number that changes would be
            traced as an unknown one; "": by the number of ranks.
        budget: bytes that a step may use, as text; "" for no bound.
        padded_shape: of every rank's shard with padding, where the ranks' shards differ in size; else None.
        inner: mesh, placements, shape and stride of the gathered parameter if it is itself a DTensor (tensor parallel).
    """

    rows: int
    dim: int
    group: str
    world: int
    reduce_group: str
    replicas: str
    copies: int
    pieces: int
    piece_group: str
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    divisor: str
    budget: str
    padded_shape: tuple[int, ...] | None
    inner: tuple[Any, Any, Any, Any] | None

    @property
    def shard_rows(self) -> int:
        """Rows of every rank's shard, padding included."""
        return -(-self.rows // self.world)


class Gather(torch.autograd.Function):
    """From a rank's shard to the parameter, and from its gradient to the shard's.

    ``padded`` is the shard with its padding, the same size on all ranks, so that all compile the same program.
    ``local`` is an unreduced gradient of earlier passes, ``partly`` one that is reduced over the shards but not over
    the replicas; both are reduced together with this pass's, None if there is none. ``position`` and ``mode`` as in
    ``gather``; with ``sums_only`` the collectives sum, and what is divided is divided beside them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shard: torch.Tensor,
        padded: torch.Tensor,
        position: torch.Tensor,
        local: torch.Tensor | None,
        partly: torch.Tensor | None,
        sharding: Sharding,
        mode: str,
        sums_only: bool,
    ) -> torch.Tensor:
        ctx.sharding, ctx.sums_only = sharding, sums_only
        ctx.rows = shard.shape[sharding.dim]
        ctx.dtype = shard.dtype
        ctx.has_local, ctx.has_partly = local is not None, partly is not None
        ctx.save_for_backward(*(tensor for tensor in (local, partly) if tensor is not None))
        return gather(padded, position, sharding, mode)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, saved = gradients[0], list(ctx.saved_tensors)
        if ctx.has_local:
            gradient = gradient.to(ctx.sharding.reduce_dtype) + saved.pop(0)
        partly = saved.pop() if ctx.has_partly else None
        reduced = reduce_gradient(gradient, partly, ctx.sharding, True, ctx.sums_only)
        return (reduced.to(ctx.dtype).narrow(ctx.sharding.dim, 0, ctx.rows), *(None,) * 7)


class GatherReducedPartly(torch.autograd.Function):
    """Like ``Gather``, with the gradient reduced over the shards only and going to ``holder``, in a shard's shape."""

    @staticmethod
    def forward(
        ctx: Any,
        padded: torch.Tensor,
        position: torch.Tensor,
        local: torch.Tensor | None,
        holder: torch.Tensor,
        sharding: Sharding,
        mode: str,
        sums_only: bool,
    ) -> torch.Tensor:
        ctx.sharding, ctx.sums_only = sharding, sums_only
        ctx.has_local = local is not None
        ctx.save_for_backward(*([local] if local is not None else []))
        return gather(padded, position, sharding, mode)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.has_local:
            gradient = gradient.to(ctx.sharding.reduce_dtype) + ctx.saved_tensors[0]
        reduced = reduce_gradient(gradient, None, ctx.sharding, False, ctx.sums_only)
        return (None, None, None, reduced, *(None,) * 3)


class GatherUnreduced(torch.autograd.Function):
    """Like ``Gather``, with the gradient going unreduced to ``holder``, which has the parameter's shape."""

    @staticmethod
    def forward(
        ctx: Any, padded: torch.Tensor, position: torch.Tensor, holder: torch.Tensor, sharding: Sharding, mode: str
    ) -> torch.Tensor:
        ctx.dtype = holder.dtype
        return gather(padded, position, sharding, mode)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, gradients[0].to(ctx.dtype), None, None


class WithZeroGradients(torch.autograd.Function):
    """Identity of the first ``count`` tensors; in the backward pass the others have gradients of zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.others = [(tensor.shape, tensor.dtype) for tensor in tensors[count:]]
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *gradients, *(gradients[0].new_zeros(shape, dtype=dtype) for shape, dtype in ctx.others))


def gather(padded: torch.Tensor, position: torch.Tensor, sharding: Sharding, mode: str) -> torch.Tensor:
    """The parameter (this rank's tensor-parallel part of it) from all ranks' padded shards, in ``param_dtype``.

    Args:
        mode: ``KEEP``, ``AGAIN`` or ``PIECE``: what is kept of it for the backward pass.
        position: this rank's number in ``piece_group``, int64, one element.
    """
    ops = torch.ops._c10d_functional
    source = padded.to(sharding.param_dtype).contiguous()
    if sharding.world == 1:
        return source.view_as(source)
    mark = {GATHER: KEEP if mode == KEEP else AGAIN}
    with annotate({**mark, BUDGET: sharding.budget} if sharding.budget else mark):
        stacked: torch.Tensor = ops.wait_tensor(ops.all_gather_into_tensor(source, sharding.world, sharding.group))
    if mode == PIECE:
        stacked = torch.ops.dcompile.keep_piece(stacked, position, sharding.pieces, sharding.piece_group)
    if sharding.dim:
        stacked = torch.cat(stacked.chunk(sharding.world, 0), sharding.dim)
    if stacked.shape[sharding.dim] == sharding.rows:
        return stacked
    return stacked.narrow(sharding.dim, 0, sharding.rows)


def reduce_gradient(
    gradient: torch.Tensor, partly: torch.Tensor | None, sharding: Sharding, replicas: bool, sums_only: bool
) -> torch.Tensor:
    """The mean of all ranks' gradients, this rank's shard of it with padding, in ``sharding.reduce_dtype``.

    float16 is divided by about the square root of the ranks before and after the sum, against overflow, as FSDP2 does.

    Args:
        partly: gradients of earlier passes that were reduced over the shards only.
        replicas: reduce over the ranks that hold the same shard, too.
        sums_only: the collectives sum, and what is divided is divided beside them.
    """
    ops = torch.ops._c10d_functional
    before, after, average = _divisors(sharding, sums_only)
    scaled = _pad(gradient.to(sharding.reduce_dtype), sharding.dim, sharding.shard_rows * sharding.world)
    if before != 1.0:
        scaled = scaled * (1.0 / before)
    if sharding.dim:
        scaled = torch.cat(scaled.chunk(sharding.world, sharding.dim), 0)
    op = "avg" if average else "sum"
    reduced = scaled.contiguous()
    if sharding.world > 1:
        reduced = ops.wait_tensor(ops.reduce_scatter_tensor(reduced, op, sharding.world, sharding.reduce_group))
    if sharding.copies > 1 and replicas:
        whole = reduced if partly is None else reduced + partly
        reduced = ops.wait_tensor(ops.all_reduce(whole, op, sharding.replicas))
    elif sharding.copies > 1:
        return reduced  # divided afterwards with the rest
    return reduced * (1.0 / after) if after != 1.0 else reduced


def _divisors(sharding: Sharding, sums_only: bool) -> tuple[float, float, bool]:
    """What to divide by before and after the sum, and whether the collectives average themselves."""
    ranks = sharding.world * sharding.copies
    whole = float(sharding.divisor or ranks)
    if sharding.reduce_dtype in (torch.float32, torch.bfloat16):
        if sums_only:
            return 1.0, whole, False
        return (whole, 1.0, False) if sharding.divisor else (1.0, 1.0, ranks > 1)
    before = 1.0
    while whole % before == 0 and whole / before > before:
        before *= 2
    return before, whole / before, False


def _pad(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def unreduced_holder(local: torch.Tensor, sharding: Sharding, trained: bool) -> torch.Tensor:
    """A leaf in the shape of the gathered parameter whose ``.grad`` collects unreduced gradients. It has one element
    of memory."""
    return _holder(local, sharding, sharding.rows, trained)


def partly_reduced_holder(local: torch.Tensor, sharding: Sharding, trained: bool) -> torch.Tensor:
    """The same for gradients that are reduced over the shards but not over the replicas, in a padded shard's shape."""
    return _holder(local, sharding, sharding.shard_rows, trained)


def _holder(local: torch.Tensor, sharding: Sharding, rows: int, trained: bool) -> torch.Tensor:
    shape = list(local.shape)
    shape[sharding.dim] = rows
    cell = torch.zeros((), dtype=sharding.reduce_dtype, device=local.device)
    return cell.expand(shape).requires_grad_(trained)
