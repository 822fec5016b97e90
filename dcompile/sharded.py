"""Fully sharded data parallelism as part of the program: every gather of a parameter and every reduction of a gradient
stands in the graph.

    fully_shard(model, ...)                       # torch.distributed.fsdp, as in eager
    model = dcompile.fully_sharded(model)
    step = torch.compile(model, backend="dcompile")

FSDP2 gathers parameters from hooks beside the compiled program, one graph for each wrapped block. Here the same
parameters are gathered by functional collectives inside the forward pass, and their gradients are reduced by the
backward pass of these gathers. The parameters stay the DTensors that ``fully_shard`` made: optimizer, gradient
clipping, ``state_dict`` and checkpoints are those of eager FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dcompile.errors import DCompileError
from dcompile.fsdp import (
    Unit,
    map_tensors,
    piece_position,
    replace_hooks,
    shadow_settings,
    sharding_of,
    units_of,
    watch_entry,
)
from dcompile.sharding import (
    Gather,
    GatherReducedPartly,
    GatherUnreduced,
    Sharding,
    WithZeroGradients,
    gather,
    partly_reduced_holder,
    unreduced_holder,
)
from dcompile.wrapping import Wrapper


class FullySharded(Wrapper):
    """See ``fully_sharded``. The wrapped module's parameters stay those of ``fully_shard``.

    The forward pass reads each parameter's local shard through a plain tensor on the same memory: a DTensor among the
    inputs would be taken apart and put together again at every call. Its gradient is handed on to the parameter as
    soon as it is complete.
    """

    def __init__(self, module: nn.Module, peak_memory_bytes: int | None = None) -> None:
        super().__init__(module)
        self._peak_memory_bytes = peak_memory_bytes
        self._units = units_of(module)
        self._managed = {name: managed for unit in self._units for name, managed in unit.managed.items()}
        self._shardings: dict[str, Sharding] = {}
        self._positions: dict[str, torch.Tensor] = {}
        self._shards: dict[str, torch.Tensor] = {}
        self._padded: dict[str, torch.Tensor] = {}
        self._unreduced: dict[str, torch.Tensor] = {}
        self._partly: dict[str, torch.Tensor] = {}
        self._frozen = [name for name, managed in self._managed.items() if not managed.sharded_param.requires_grad]
        for unit in self._units:
            for name, managed in unit.managed.items():
                self._shardings[name] = sharding_of(name, managed, unit.group, self._peak_memory_bytes)
                self._positions[name] = piece_position(unit.group, managed.sharded_param.device)
                self._point_to(name)
                managed.reset_sharded_param = partial(self._reset, name, managed.reset_sharded_param)
        for child in module.modules():
            if isinstance(child, FSDPModule):
                replace_hooks(child)
                shadow_settings(child, self._drop_unreduced, self._update)
        self._update()

    @property
    def ahead_bytes(self) -> int:
        """What eager FSDP2 has in flight at most: the largest unit's parameters being gathered, and its gradients being
        reduced, each with the shards."""
        return 2 * max((sum(map(self._carried_bytes, unit.managed)) for unit in self._units), default=0)

    def _carried_bytes(self, name: str) -> int:
        sharding, padded = self._shardings[name], self._padded[name]
        return padded.numel() * (sharding.world + 1) * sharding.param_dtype.itemsize

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward."""
        local: dict[str, torch.Tensor] = {}
        for unit in self._units:
            unit.entered = not unit.watched
            local |= {name: self._gathered(name, unit) for name in unit.managed}
        gathered = {name: self._as_parameter(name, tensor) for name, tensor in local.items()}
        result = torch.func.functional_call(self.module, gathered, args, kwargs)
        also_unused = [
            local[name]
            for unit in self._units
            if _fills_unused(unit) and unit.entered
            for name in unit.managed
            if local[name].requires_grad
        ]
        return _with_zero_gradients(result, also_unused) if also_unused else result

    def _gathered(self, name: str, unit: Unit) -> torch.Tensor:
        sharding, shard, group = self._shardings[name], self._shards[name], unit.group
        padded, position = self._padded[name], self._positions[name]
        if not shard.requires_grad or not torch.is_grad_enabled():
            return gather(padded, position, sharding, unit.mode())
        unreduced, partly = self._unreduced[name], self._partly[name]
        if not group.reduce_grads:
            return _apply(GatherUnreduced, padded, position, unreduced, sharding, unit.mode())
        how = (sharding, unit.mode(), group.force_sum_reduction_for_comms)
        local = unreduced.grad
        unreduced.grad = None
        if sharding.copies > 1 and not group.all_reduce_grads:
            return _apply(GatherReducedPartly, padded, position, local, partly, *how)
        full = _apply(Gather, shard, padded, position, local, partly.grad, *how)
        partly.grad = None
        return full

    def _as_parameter(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """What the module reads: the gathered tensor itself, or a DTensor around it where it is tensor parallel."""
        inner = self._shardings[name].inner
        if inner is None:
            return local
        mesh, placements, shape, stride = inner
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _reset(self, name: str, reset: Callable[[], None]) -> None:
        """What FSDP2 calls when the memory of a parameter may have changed: a state was loaded, the module moved."""
        reset()
        self._point_to(name)

    def _point_to(self, name: str) -> None:
        """Let the plain tensors of a parameter share its memory as it is now."""
        managed, sharding = self._managed[name], self._shardings[name]
        parameter: DTensor = managed.sharded_param
        local = parameter.to_local().detach()
        shard = local.detach().requires_grad_(parameter.requires_grad)
        if parameter.requires_grad:
            hooked: Any = shard
            hooked.register_post_accumulate_grad_hook(partial(self._hand_on, name))
        self._shards[name] = shard
        shape = sharding.padded_shape
        self._padded[name] = local if shape is None else managed._sharded_param_data.view(shape)
        self._unreduced[name] = unreduced_holder(local, sharding, parameter.requires_grad)
        self._partly[name] = partly_reduced_holder(local, sharding, parameter.requires_grad)
        self._positions[name] = self._positions[name].to(local.device)

    def _drop_unreduced(self) -> None:
        """Forget gradients of passes that were not reduced."""
        for holder in (*self._unreduced.values(), *self._partly.values()):
            holder.grad = None

    def _update(self) -> None:
        """Take over settings that have changed."""
        for unit in self._units:
            if _fills_unused(unit):
                watch_entry(unit)
            for name, managed in unit.managed.items():
                self._shardings[name] = sharding_of(name, managed, unit.group, self._peak_memory_bytes)

    def _hand_on(self, name: str, shard: torch.Tensor) -> None:
        """Add a complete gradient of a shard to the parameter's own."""
        gradient, shard.grad = shard.grad, None
        parameter: DTensor = self._managed[name].sharded_param
        self._check_frozen()
        if gradient is None or not parameter.requires_grad:  # None: this pass did not use it
            return
        if parameter.grad is None:
            parameter.grad = self._managed[name].to_sharded_dtensor(gradient)
        else:
            cast(DTensor, parameter.grad).to_local().add_(gradient)
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(parameter)

    def _check_frozen(self) -> None:
        for name in self._frozen:
            if self._managed[name].sharded_param.requires_grad:
                raise DCompileError(
                    f"parameter {name} was frozen when fully_sharded was called and is trained now: set requires_grad "
                    "before fully_sharded"
                )


def _fills_unused(unit: Unit) -> bool:
    """Whether unused parameters get gradients of zero; a setting from PyTorch 2.13 on."""
    return bool(getattr(unit.group, "reduce_scatter_unused_params", False))


def fully_sharded(module: nn.Module, *, peak_memory_bytes: int | None = None) -> FullySharded:
    """A module that computes what a ``fully_shard``-ed ``module`` computes, with all communication in the graph.

    Compiled with ``torch.compile`` it gives one forward and one backward graph. A parameter's all-gather stands before
    its first use; with ``reshard_after_forward`` it stands in the backward graph once more, over the whole group
    (True) or over groups of so many ranks (a number). The compiler decides what travels together and when it starts:
    prefetch settings of the wrapper have no effect, with a warning (``fsdp.DECIDED_HERE``). Mixed precision, uneven
    shards, sharding of another dimension, shared and frozen parameters, hybrid sharding on a mesh of two dimensions,
    tensor parallel parameters, and the settings in ``fsdp.FOLLOWED`` work as in eager. Set ``requires_grad`` of the
    parameters before.

    ``fully_shard``'s own hooks are taken off ``module``: run it through the returned wrapper from here on. Save and
    load checkpoints through either of them.

    Args:
        module: ``fully_shard`` was applied to it, to some of its children, or both.
        peak_memory_bytes: as the option of that name, which ``dcompile.compile`` hands on: as many parameters stay
            gathered between forward and backward pass as fit, whatever ``reshard_after_forward`` says. None: as that
            says.

    Raises:
        DCompileError: nothing in ``module`` is fully sharded, or it uses a feature that would be skipped: offloading to
            the CPU, an all-reduce hook, own communication functions, pre- or post-gather extensions of a parameter,
            forward methods registered with FSDP2, a placement that is neither ``Shard`` nor ``Replicate``; or this rank
            is not in its mesh. Methods in ``fsdp.REFUSED`` raise it from here on.
    """
    return FullySharded(module, peak_memory_bytes)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to ``module`` or one inside it, and its hooks are still there."""
    return not isinstance(module, FullySharded) and any(isinstance(child, FSDPModule) for child in module.modules())


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    return cast(torch.Tensor, cast(Any, function.apply)(*args))


def _with_zero_gradients(result: Any, parameters: list[torch.Tensor]) -> Any:
    """``result`` such that a backward pass from it gives ``parameters`` a gradient even where it does not use them."""
    outputs: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            outputs.append(tensor)
        return tensor

    map_tensors(result, collect)
    if not outputs:
        return result
    changed = iter(cast(Any, WithZeroGradients.apply)(len(outputs), *outputs, *parameters))
    return map_tensors(result, lambda tensor: next(changed) if tensor.requires_grad else tensor)
