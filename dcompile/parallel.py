"""Data parallelism as part of the program: the averaged gradient all-reduce of each parameter stands in the backward graph.

    model = dcompile.parallel.data_parallel(model)
    step = torch.compile(model, backend="dcompile")

PyTorch's DistributedDataParallel launches its all-reduces from hooks beside the compiled program. Here they are nodes of the backward graph,
one for each parameter, so that the compiler buckets them and puts compute beside them. Uncompiled the wrapper gives the same numbers,
one synchronous all-reduce at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dcompile.errors import DCompileError, Divergence

PREFIX = "module."


class _AverageGradient(torch.autograd.Function):
    """Identity whose gradient is the mean of all ranks' gradients.

    Scaled before the sum, by multiplication with ``1 / world``, which is what DistributedDataParallel does: results agree to
    the last bit as far as the backend's order of summation does.
    """

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, group_name: str, world: int) -> torch.Tensor:
        ctx.group_name = group_name
        ctx.world = world
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scaled = gradients[0] * (1.0 / ctx.world)
        pending = torch.ops._c10d_functional.all_reduce(scaled, "sum", ctx.group_name)
        return torch.ops._c10d_functional.wait_tensor(pending), None, None


class DataParallel(nn.Module):
    """See ``data_parallel``.

    Attributes:
        module: the wrapped module. ``state_dict`` has its keys, without a prefix.
        process_group: the ranks that hold copies.
    """

    def __init__(self, module: nn.Module, process_group: dist.ProcessGroup | None, broadcast_parameters: bool) -> None:
        super().__init__()
        if not dist.is_available() or not dist.is_initialized():
            raise DCompileError("data_parallel needs a process group: call torch.distributed.init_process_group first")
        self.module = module
        self.process_group = process_group if process_group is not None else dist.group.WORLD
        self._group_name = str(self.process_group.group_name)
        self._world = dist.get_world_size(self.process_group)
        self._synchronise = True
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        _check_equal(module, self.process_group)
        if broadcast_parameters:
            _broadcast(module, self.process_group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward."""
        if not self._synchronise or self._world == 1 or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        averaged = {
            name: _AverageGradient.apply(parameter, self._group_name, self._world)
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }
        return torch.func.functional_call(self.module, averaged, args, kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward passes inside leave their gradients local, to be accumulated.

        The gradients that later synchronised backward passes add are averages; the local ones that stand in ``.grad`` before
        them are not averaged by them.
        """
        before = self._synchronise
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = before


def data_parallel(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, *, broadcast_parameters: bool = True
) -> DataParallel:
    """A module that computes what ``module`` computes, with gradients averaged over all ranks.
    """
    return DataParallel(module, process_group, broadcast_parameters)
