"""Data parallelism as part of the program: the averaged all-reduce of each gradient stands in the backward graph.

    model = dcompile.parallel.data_parallel(model)
    step = torch.compile(model, backend="dcompile")

PyTorch's DistributedDataParallel launches its all-reduces from hooks beside the compiled program. Here they are nodes
of the backward graph, one for each parameter, so that the compiler buckets them and puts compute beside them.
Uncompiled the wrapper gives the same numbers, one synchronous all-reduce at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dcompile.errors import DCompileError, Divergence
from dcompile.wrapping import Wrapper


class _AverageGradient(torch.autograd.Function):
    """Identity whose gradient is the mean of all ranks' gradients.

    Scaled before the sum, by multiplication with ``1 / world``, as DistributedDataParallel does: results agree as far
    as the backend's order of summation does.

    With ``local``, a gradient that stands in ``.grad`` un-averaged, the gradient is what has to be added to ``local``
    to make it the mean of all ranks' ``local`` plus gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, local: torch.Tensor | None, group_name: str, world: int
    ) -> torch.Tensor:
        ctx.group_name = group_name
        ctx.world = world
        ctx.has_local = local is not None
        if local is not None:
            ctx.save_for_backward(local)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = gradients[0]
        if ctx.has_local:
            (local,) = ctx.saved_tensors
            return _mean(local + gradient, ctx.group_name, ctx.world) - local, None, None, None
        return _mean(gradient, ctx.group_name, ctx.world), None, None, None


def _mean(tensor: torch.Tensor, group_name: str, world: int) -> torch.Tensor:
    pending = torch.ops._c10d_functional.all_reduce(tensor * (1.0 / world), "sum", group_name)
    return cast(torch.Tensor, torch.ops._c10d_functional.wait_tensor(pending))


class DataParallel(Wrapper):
    """See ``data_parallel``.

    Attributes:
        process_group: the ranks that hold copies.
    """

    def __init__(self, module: nn.Module, process_group: dist.ProcessGroup | None, broadcast_parameters: bool) -> None:
        super().__init__(module)
        if not dist.is_available() or not dist.is_initialized():
            raise DCompileError("data_parallel needs a process group: call torch.distributed.init_process_group first")
        group = process_group if process_group is not None else dist.group.WORLD
        assert group is not None, "an initialised torch.distributed has a default group"
        self.process_group = group
        self._group_name = str(self.process_group.group_name)
        self._world = dist.get_world_size(self.process_group)
        self._synchronise = True
        self._has_local = False
        _check_local(module)
        _check_equal(module, self.process_group)
        if broadcast_parameters:
            _broadcast(module, self.process_group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward."""
        if not self._synchronise or self._world == 1 or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        average: Any = _AverageGradient.apply
        averaged = {
            name: average(parameter, parameter.grad if self._has_local else None, self._group_name, self._world)
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        self._has_local = False
        return torch.func.functional_call(self.module, averaged, args, kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward passes inside leave their gradients local, accumulated in ``.grad``.

        The backward pass of the first forward after it (with gradients enabled) averages what was accumulated together
        with its own gradients. Between these two ``.grad`` must not be changed.
        """
        before = self._synchronise
        self._synchronise = False
        self._has_local = True
        try:
            yield
        finally:
            self._synchronise = before


def data_parallel(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, *, broadcast_parameters: bool = True
) -> DataParallel:
    """A module that computes what ``module`` computes, with gradients averaged over the ranks of ``process_group``.

    Compiled with ``torch.compile`` it gives one forward and one backward graph; the backward graph holds one
    ``all_reduce`` and one ``wait_tensor`` for each parameter that requires a gradient. A parameter that several modules
    share is reduced once. Frozen parameters are not reduced. A parameter the forward pass does not use gets no gradient
    and no all-reduce; every rank must use the same ones. Buffers are made equal here and not later: running statistics
    follow each rank's own batches afterwards.

    Args:
        module: the same on all ranks; its parameters stay its own, so an optimizer may be made before or after.
        process_group: ranks that hold copies; None for all of them.
        broadcast_parameters: take parameters and buffers from the group's rank 0. If not, they must be equal.

    Raises:
        DCompileError: there is no process group, or a parameter has sparse gradients or no storage yet.
        Divergence: the ranks' modules differ in the name, shape, dtype or ``requires_grad`` of a parameter.
    """
    return DataParallel(module, process_group, broadcast_parameters)


def _signature(module: nn.Module) -> list[str]:
    parameters = [
        f"{name} {tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}" for name, p in module.named_parameters()
    ]
    return parameters + [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()]


def _check_local(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise DCompileError(f"parameter {name} has no shape yet: run one forward pass before data_parallel")
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse:
            raise DCompileError(
                f"module {name} has sparse gradients, which are not averaged: construct it with sparse=False"
            )


def _check_equal(module: nn.Module, group: dist.ProcessGroup) -> None:
    own = _signature(module)
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, own, group=group)
    for rank, other in enumerate(everyone):
        for ours, theirs in itertools.zip_longest(everyone[0], other, fillvalue="nothing"):
            if ours != theirs:
                raise Divergence(
                    f"data_parallel: rank 0 has {ours} where rank {rank} has {theirs} (ranks within the group)"
                )


@torch.no_grad()
def _broadcast(module: nn.Module, group: dist.ProcessGroup) -> None:
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        dense = tensor.detach().contiguous()
        dist.broadcast(dense, group=group, group_src=0)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.copy_(dense)
