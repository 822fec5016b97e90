"""Several tensors in one launch, each where it lies: NCCL groups them, so that nothing is copied into one buffer.

Backends without such a launch get one flat buffer instead (``flat``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dcompile.runtime import flat as fl

Tensors = Sequence[torch.Tensor]


def groups_launches(group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    """Whether the backend of ``group`` moves several tensors like ``tensor`` in one launch (only NCCL does)."""
    config = str(dist.get_backend_config(group))
    return tensor.is_cuda and ("cuda:nccl" in config or config == "nccl")


def all_contiguous(*lists: Tensors) -> bool:
    """Whether every tensor of ``lists`` can be handed to the backend as it is."""
    return all(tensor.is_contiguous() for tensors in lists for tensor in tensors)


def all_reduce(group: dist.ProcessGroup, tensors: Tensors, op: Any) -> Any:
    """Reduce each of ``tensors`` (1-D, contiguous) in place; one work."""
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp, options.asyncOp = op, True
    return group.allreduce_coalesced([t for t in tensors if t.numel()], options)


def all_gather(group: dist.ProcessGroup, results: Tensors, sources: Tensors) -> Any:
    """Gather each source into its result (both contiguous); one work."""
    options = dist.distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]
    options.asyncOp = True
    launch = _method(group, "all_gather_single_coalesced", "allgather_into_tensor_coalesced")
    return launch(*_flat_pairs(results, sources), options)


def reduce_scatter(group: dist.ProcessGroup, results: Tensors, sources: Tensors, op: Any) -> Any:
    """Reduce each source and leave this rank's share in its result (both contiguous); one work."""
    options = dist.ReduceScatterOptions()
    options.reduceOp, options.asyncOp = op, True
    launch = _method(group, "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")
    return launch(*_flat_pairs(results, sources), options)


def _flat_pairs(results: Tensors, sources: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and sources that hold anything, as 1-D tensors of a dtype that every backend moves."""
    pairs = [(r, s) for r, s in zip(results, sources, strict=True) if r.numel() or s.numel()]
    return [fl.movable(r) for r, _ in pairs], [fl.movable(s) for _, s in pairs]


def _method(group: dist.ProcessGroup, name: str, former: str) -> Callable[..., Any]:
    """A method by its name from PyTorch 2.13 on, else by its former one."""
    found: Callable[..., Any] = getattr(group, name, None) or getattr(group, former)
    return found
