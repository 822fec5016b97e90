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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.fx.traceback import annotate

from dcompile.capture.regather import AGAIN, GATHER, KEEP
from dcompile.errors import DCompileError
from dcompile.wrapping import Wrapper


@dataclass(frozen=True)
class Sharding:
    """How one parameter is stored and communicated.

    Attributes:
        rows: extent of the sharded dimension when gathered.
        dim: the sharded dimension.
        group, world: process group name and number of ranks that hold the shards.
        replicas, copies: process group name and number of ranks that hold the same shard; ``""`` and 1 without HSDP.
        param_dtype: what is gathered and computed with.
        reduce_dtype: what gradients are reduced in.
        divisor: gradients are summed over all ranks and divided by it; None: by the number of ranks.
        again: gathered anew for the backward pass.
        padded_shape: of every rank's shard with padding, where the ranks' shards differ in size; else None.
        inner: mesh, placements, shape and stride of the gathered parameter if it is itself a DTensor (tensor parallel).
    """

    rows: int
    dim: int
    group: str
    world: int
    replicas: str
    copies: int
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    divisor: float | None
    again: bool
    padded_shape: tuple[int, ...] | None
    inner: tuple[Any, Any, Any, Any] | None

    @property
    def shard_rows(self) -> int:
        """Rows of every rank's shard, padding included."""
        return -(-self.rows // self.world)


class _Gather(torch.autograd.Function):
    """From a rank's shard to the parameter, and from its gradient to the shard's.

    ``padded`` is the shard with its padding, the same size on all ranks, so that all compile the same program. With
    ``local``, an unreduced gradient of earlier passes, that is reduced together with this one.
    """

    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, padded: torch.Tensor, local: torch.Tensor | None, sharding: Sharding
    ) -> torch.Tensor:
        ctx.sharding = sharding
        ctx.rows = shard.shape[sharding.dim]
        ctx.dtype = shard.dtype
        ctx.has_local = local is not None
        if local is not None:
            ctx.save_for_backward(local)
        return gather(padded, sharding)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = gradients[0]
        if ctx.has_local:
            gradient = gradient.to(ctx.sharding.reduce_dtype) + ctx.saved_tensors[0]
        reduced = reduce_gradient(gradient, ctx.sharding).to(ctx.dtype)
        return reduced.narrow(ctx.sharding.dim, 0, ctx.rows), None, None, None


class _GatherUnreduced(torch.autograd.Function):
    """Like ``_Gather``, with the gradient going unreduced to ``holder``, which has the parameter's shape."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, holder: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        ctx.dtype = holder.dtype
        return gather(padded, sharding)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, gradients[0].to(ctx.dtype), None


def gather(padded: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The parameter (this rank's tensor-parallel part of it) from all ranks' padded shards, in ``param_dtype``."""
    ops = torch.ops._c10d_functional
    with annotate({GATHER: AGAIN if sharding.again else KEEP}):
        source = padded.to(sharding.param_dtype).contiguous()
        stacked = ops.wait_tensor(ops.all_gather_into_tensor(source, sharding.world, sharding.group))
    if sharding.dim:
        stacked = torch.cat(stacked.chunk(sharding.world, 0), sharding.dim)
    if stacked.shape[sharding.dim] == sharding.rows:
        return cast(torch.Tensor, stacked)
    return cast(torch.Tensor, stacked.narrow(sharding.dim, 0, sharding.rows))


def reduce_gradient(gradient: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The mean of all ranks' gradients, this rank's shard of it with padding, in ``sharding.reduce_dtype``.

    float16 is divided by about the square root of the ranks before and after the sum, against overflow, as FSDP2 does.
    """
    ops = torch.ops._c10d_functional
    before, after, average = _divisors(sharding)
    scaled = _pad(gradient.to(sharding.reduce_dtype), sharding.dim, sharding.shard_rows * sharding.world)
    if before != 1.0:
        scaled = scaled * (1.0 / before)
    if sharding.dim:
        scaled = torch.cat(scaled.chunk(sharding.world, sharding.dim), 0)
    op = "avg" if average else "sum"
    reduced = ops.wait_tensor(ops.reduce_scatter_tensor(scaled.contiguous(), op, sharding.world, sharding.group))
    if sharding.copies > 1:
        reduced = ops.wait_tensor(ops.all_reduce(reduced, op, sharding.replicas))
    return cast(torch.Tensor, reduced * (1.0 / after) if after != 1.0 else reduced)


def _divisors(sharding: Sharding) -> tuple[float, float, bool]:
    """What to divide by before and after the sum, and whether the collectives average themselves."""
    ranks = sharding.world * sharding.copies
    if sharding.reduce_dtype in (torch.float32, torch.bfloat16):
        if sharding.divisor is None:
            return 1.0, 1.0, ranks > 1
        return sharding.divisor, 1.0, False
    whole = float(ranks) if sharding.divisor is None else sharding.divisor
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


class FullySharded(Wrapper):
    """See ``fully_sharded``. The wrapped module's parameters stay those of ``fully_shard``.

    The forward pass reads each parameter's local shard through a plain tensor on the same memory: a DTensor among the
    inputs would be taken apart and put together again at every call. Its gradient is handed on to the parameter as
    soon as it is complete.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        found = dict(_managed(module))
        self._managed = {name: managed for name, (managed, _) in found.items()}
        self._groups = {name: group for name, (_, group) in found.items()}
        self._shardings = {name: _sharding(managed, group) for name, (managed, group) in found.items()}
        self._shards: dict[str, torch.Tensor] = {}
        self._padded: dict[str, torch.Tensor] = {}
        self._holders: dict[str, torch.Tensor] = {}
        self._frozen = [name for name, managed in self._managed.items() if not managed.sharded_param.requires_grad]
        for name, managed in self._managed.items():
            self._point_to(name)
            managed.reset_sharded_param = partial(self._reset, name, managed.reset_sharded_param)
        for child in module.modules():
            if isinstance(child, FSDPModule):
                _replace_hooks(child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward."""
        gathered = {name: self._gathered(name) for name in self._shardings}
        return torch.func.functional_call(self.module, gathered, args, kwargs)

    def _gathered(self, name: str) -> torch.Tensor:
        sharding, shard, holder, padded = (
            self._shardings[name],
            self._shards[name],
            self._holders[name],
            self._padded[name],
        )
        if not shard.requires_grad or not torch.is_grad_enabled():
            full = gather(padded, sharding)
        elif not self._groups[name].reduce_grads:
            full = cast(Any, _GatherUnreduced.apply)(padded, holder, sharding)
        else:
            full = cast(Any, _Gather.apply)(shard, padded, holder.grad, sharding)
            holder.grad = None
        if sharding.inner is None:
            return full
        mesh, placements, shape, stride = sharding.inner
        return DTensor.from_local(full, mesh, placements, run_check=False, shape=shape, stride=stride)

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
        self._holders[name] = _holder(local, sharding, parameter.requires_grad)

    def _hand_on(self, name: str, shard: torch.Tensor) -> None:
        """Add a complete gradient of a shard to the parameter's own."""
        gradient, shard.grad = shard.grad, None
        parameter: DTensor = self._managed[name].sharded_param
        self._check_frozen()
        if not parameter.requires_grad:
            return
        if parameter.grad is None:
            parameter.grad = self._managed[name].to_sharded_dtensor(gradient)
        else:
            cast(DTensor, parameter.grad).to_local().add_(cast(torch.Tensor, gradient))
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(parameter)

    def _check_frozen(self) -> None:
        for name in self._frozen:
            if self._managed[name].sharded_param.requires_grad:
                raise DCompileError(
                    f"parameter {name} was frozen when fully_sharded was called and is trained now: set requires_grad "
                    "before fully_sharded"
                )


def fully_sharded(module: nn.Module) -> FullySharded:
    """A module that computes what a ``fully_shard``-ed ``module`` computes, with all communication in the graph.

    Compiled with ``torch.compile`` it gives one forward and one backward graph. A parameter's all-gather stands before
    its first use; with ``reshard_after_forward`` (any value but False) it stands in the backward graph once more. The
    compiler decides what travels together and when it starts: prefetch settings of the wrapper have no effect. Mixed
    precision, uneven shards, sharding of another dimension, shared and frozen parameters, hybrid sharding on a mesh of
    two dimensions, tensor parallel parameters, and ``set_requires_gradient_sync`` work as in eager. Set
    ``requires_grad`` of the parameters before.

    ``fully_shard``'s own hooks are taken off ``module``: run it through the returned wrapper from here on. Save and
    load checkpoints through either of them.

    Args:
        module: ``fully_shard`` was applied to it, to some of its children, or both.

    Raises:
        DCompileError: nothing in ``module`` is fully sharded, or it uses a feature that would be skipped: offloading to
            the CPU, an all-reduce hook, own communication functions, pre- or post-gather extensions of a parameter.
    """
    return FullySharded(module)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to ``module`` or one inside it, and its hooks are still there."""
    return not isinstance(module, FullySharded) and any(isinstance(child, FSDPModule) for child in module.modules())


def _holder(local: torch.Tensor, sharding: Sharding, trained: bool) -> torch.Tensor:
    """A leaf in the shape of the gathered parameter whose ``.grad`` collects unreduced gradients. It has one element
    of memory."""
    shape = list(local.shape)
    shape[sharding.dim] = sharding.rows
    cell = torch.zeros((), dtype=sharding.reduce_dtype, device=local.device)
    return cell.expand(shape).requires_grad_(trained)


def _managed(module: nn.Module) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every parameter of ``module`` that ``fully_shard`` manages: name, FSDP2's record of it, and its group.

    Reads private state of FSDP2, the same in torch 2.11 to 2.14.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = False
    for child_name, child in module.named_modules():
        if not isinstance(child, FSDPModule):
            continue
        seen = True
        state: Any = child._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is None:
                continue
            _refuse_extras(group, child_name or type(child).__name__)
            for managed in group.fsdp_params:
                if id(managed.sharded_param) in names:
                    yield names[id(managed.sharded_param)], (managed, group)
    if not seen:
        raise DCompileError("fully_sharded needs a module that torch.distributed.fsdp.fully_shard was applied to")


def _refuse_extras(group: Any, where: str) -> None:
    """Raises ``DCompileError`` for what the compiled program would silently leave out."""
    extras = {
        "offloading parameters to the CPU": any(managed.offload_to_cpu for managed in group.fsdp_params),
        "a hook on the all-reduce": group._all_reduce_hook is not None,
        "its own all-gather": type(group._all_gather_comm).__name__ != "DefaultAllGather",
        "its own reduce-scatter": type(group._reduce_scatter_comm).__name__ != "DefaultReduceScatter",
        "fsdp_pre_all_gather of a parameter": any(
            hasattr(managed._sharded_local_tensor, "fsdp_pre_all_gather") for managed in group.fsdp_params
        ),
    }
    for what, used in extras.items():
        if used:
            raise DCompileError(
                f"fully_sharded: {where} uses {what}, which the compiled program would skip; "
                "take it off, or run this model in eager FSDP2"
            )


def _sharding(managed: Any, group: Any) -> Sharding:
    parameter: DTensor = managed.sharded_param
    policy, info, placement = managed.mp_policy, managed.mesh_info, managed.fsdp_placement
    assert isinstance(placement, Shard)
    original = parameter.dtype
    param_dtype = (policy.param_dtype or original) if original.is_floating_point else original
    shard_group = getattr(info, "shard_process_group", None)
    replica_group = getattr(info, "replicate_process_group", None)
    inner = getattr(managed, "_unsharded_dtensor_spec", None) or getattr(managed, "_tp_spec", None)
    rows, world = int(managed._orig_size[placement.dim]), shard_group.size() if shard_group is not None else 1
    return Sharding(
        rows=rows,
        dim=placement.dim,
        group=str(shard_group.group_name) if shard_group is not None else "",
        world=world,
        replicas=str(replica_group.group_name) if replica_group is not None else "",
        copies=replica_group.size() if replica_group is not None else 1,
        param_dtype=param_dtype,
        reduce_dtype=policy.reduce_dtype or param_dtype,
        divisor=group.gradient_divide_factor,
        padded_shape=None if rows % world == 0 else tuple(managed.padded_sharded_param_size),
        again=managed.post_forward_mesh_info is not None,
        inner=None if inner is None else (inner.mesh, inner.placements, inner.shape, inner.stride),
    )


def _replace_hooks(child: FSDPModule) -> None:
    """In place of FSDP2's hooks on one module: the casts of its mixed-precision policy."""
    state: Any = child._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    policy, module = state._mp_policy, cast(nn.Module, child)
    if policy.cast_forward_inputs and policy.param_dtype is not None:

        def cast_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return _cast(args, policy.param_dtype), _cast(kwargs, policy.param_dtype)

        module.register_forward_pre_hook(cast_inputs, prepend=True, with_kwargs=True)
    if policy.output_dtype is not None:

        def cast_output(_: nn.Module, __: Any, output: Any) -> Any:
            return _cast(output, policy.output_dtype)

        module.register_forward_hook(cast_output)


def _cast(item: Any, dtype: torch.dtype) -> Any:
    """``item`` with all floating-point tensors in it in ``dtype``."""
    if isinstance(item, torch.Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if isinstance(item, dict):
        return type(item)((key, _cast(value, dtype)) for key, value in item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_cast(value, dtype) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(_cast(value, dtype) for value in item)
    return item
