"""What ``torch.distributed.fsdp.fully_shard`` leaves on modules, read; and what becomes of each of its settings.

The only module that reads private state of FSDP2: torch 2.11 to 2.14 agree in what is used here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from dcompile.capture.regather import AGAIN, KEEP, PIECE
from dcompile.errors import DCompileError
from dcompile.sharding import Sharding

FOLLOWED = {
    "reshard": "parameters stay sharded outside the program",
    "reset_iter_state": "unreduced gradients of earlier passes are dropped",
    "set_is_last_backward": "every backward program completes its reductions",
    "set_requires_gradient_sync": "gradients stay unreduced, in memory of their own",
    "set_requires_all_reduce": "gradients are reduced over the shards and not over the replicas",
    "set_reshard_after_forward": "gathered again in the backward program, or kept",
    "set_post_optim_event": "the current stream waits for the event",
    "set_reduce_scatter_divide_factor": "divides gradients",
    "set_gradient_divide_factor": "divides gradients",
    "set_force_sum_reduction_for_comms": "collectives sum, divisions stand beside them",
    "set_reduce_scatter_unused_params": "unused parameters have gradients of zero",
    "set_separate_reduce_scatter_group": "reductions use that group",
    "set_unshard_in_backward": "the backward program gathers what it reads, and nothing else",
}
"""Methods of ``FSDPModule`` that the compiled program follows, and how."""

DECIDED_HERE = {
    "set_reshard_after_backward": "parameters are sharded after every backward pass",
    "set_modules_to_forward_prefetch": "the schedule decides when each gather starts",
    "set_modules_to_backward_prefetch": "the schedule decides when each gather starts",
    "set_reduce_scatter_max_input_buffers": "Options.in_flight_bytes bounds what is in flight",
    "set_allocate_memory_from_process_group_for_comm": "the program's own memory plan places buffers",
    "set_symm_mem_for_comm": "the program's own memory plan places buffers",
}
"""Methods that change when and where eager FSDP2 works, not what it computes: named in a warning, without effect."""

REFUSED = {
    "unshard": "delete the call: the program gathers ahead by itself; parameter.full_tensor() gives a whole one",
    "set_custom_all_gather": "take it off, or run this model in eager FSDP2",
    "set_custom_reduce_scatter": "take it off, or run this model in eager FSDP2",
    "set_all_reduce_hook": "take it off, or run this model in eager FSDP2",
}
"""Methods that a compiled program cannot follow: calling one is an error, with the way out."""

DEFAULT_COMMUNICATION = frozenset(
    {
        "DefaultAllGather",
        "DefaultReduceScatter",
        "ProcessGroupAllocAllGather",
        "ProcessGroupAllocReduceScatter",
        "SymmMemAllGather",
        "SymmMemReduceScatter",
    }
)
"""Communication functions that compute what a plain collective computes, by the name of their class."""


@dataclass
class Unit:
    """Parameters that eager FSDP2 gathers together.

    Attributes:
        state, group: FSDP2's records of the module and of these parameters. Settings may change on them at any time.
        outermost: no module around it is fully sharded, as far as it can be seen.
        managed: FSDP2's record of each parameter, by the parameter's name.
        entered: its module has run in this forward pass, if that is watched (``watch_entry``).
    """

    state: Any
    group: Any
    outermost: bool
    managed: dict[str, Any] = field(default_factory=dict)
    entered: bool = True
    watched: bool = False

    def mode(self) -> str:
        """What is kept of the parameters between forward and backward. Traced: reads attributes, nothing else."""
        kept = self.group.post_forward_mesh_info
        # what lazy initialisation does in eager: an outermost module keeps its parameters unless told otherwise
        automatic = self.outermost and self.state._auto_reshard_after_forward and self.state._is_root is not False
        if kept is None or automatic:
            return KEEP
        return AGAIN if kept is self.group.mesh_info else PIECE


def watch_entry(unit: Unit) -> None:
    """Note from here on in ``unit.entered`` that one of its modules runs."""
    if not unit.watched:
        unit.watched = True
        for module in unit.group.modules:
            module.register_forward_pre_hook(functools.partial(_enter, unit))


def _enter(unit: Unit, *_: Any) -> None:
    unit.entered = True


def units_of(module: nn.Module) -> list[Unit]:
    """Every group of parameters in ``module`` that ``fully_shard`` manages.

    Raises:
        DCompileError: there is none, or one uses something the compiled program would leave out.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[int, Unit] = {}
    inside: set[int] = set()
    states = 0
    for child_name, child in module.named_modules():
        if not isinstance(child, FSDPModule):
            continue
        states += 1
        state: Any = child._get_fsdp_state()
        where = child_name or type(child).__name__
        _refuse(where, {"register_fsdp_forward_method": any(_is_forward_method(v) for v in vars(child).values())})
        outermost = id(child) not in inside
        inside.update(id(below) for below in cast(nn.Module, child).modules())
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is None or id(group) in found:
                continue
            _refuse(where, _extras(group))
            if not group.is_sharded:
                group.reshard()
            managed = {names[id(m.sharded_param)]: m for m in group.fsdp_params if id(m.sharded_param) in names}
            found[id(group)] = Unit(state, group, outermost, managed)
    if not states:
        raise DCompileError("fully_sharded needs a module that torch.distributed.fsdp.fully_shard was applied to")
    return list(found.values())


def _extras(group: Any) -> dict[str, bool]:
    """What the compiled program would silently leave out, and whether ``group`` uses it."""
    return {
        "offloading parameters to the CPU": any(managed.offload_to_cpu for managed in group.fsdp_params),
        "a hook on the all-reduce": group._all_reduce_hook is not None,
        "its own all-gather": type(group._all_gather_comm).__name__ not in DEFAULT_COMMUNICATION,
        "its own reduce-scatter": type(group._reduce_scatter_comm).__name__ not in DEFAULT_COMMUNICATION,
        "fsdp_pre_all_gather of a parameter": any(
            hasattr(managed._sharded_local_tensor, "fsdp_pre_all_gather") for managed in group.fsdp_params
        ),
        "parameters on a mesh of all parallel dimensions (dp_mesh_dims)": bool(
            getattr(group.mesh_info, "is_spmd_mesh", False)
        ),
        "parameters on the meta device": any(managed.sharded_param.is_meta for managed in group.fsdp_params),
    }


def _refuse(where: str, extras: dict[str, bool]) -> None:
    for what, used in extras.items():
        if used:
            raise DCompileError(
                f"fully_sharded: {where} uses {what}, which the compiled program would skip; "
                "take it off, or run this model in eager FSDP2"
            )


def _is_forward_method(value: Any) -> bool:
    code = getattr(getattr(value, "__func__", None), "__code__", None)
    return code is not None and code.co_name == "wrapped_method" and "_fully_shard" in code.co_filename


def sharding_of(name: str, managed: Any, group: Any, peak_memory_bytes: int | None) -> Sharding:
    """How parameter ``name`` is stored.

    Args:
        peak_memory_bytes: as in ``Options``.

    Raises:
        DCompileError: it is sharded in a way the program does not see through, or this rank has no part of it.
    """
    parameter: DTensor = managed.sharded_param
    policy, info, placement = managed.mp_policy, managed.mesh_info, managed.fsdp_placement
    inner = getattr(managed, "_unsharded_dtensor_spec", None) or getattr(managed, "_tp_spec", None)
    _check_placements(name, placement, inner)
    _check_mesh(name, info.mesh)
    original = parameter.dtype
    param_dtype = (policy.param_dtype or original) if original.is_floating_point else original
    shard_group = getattr(info, "shard_process_group", None)
    replica_group = getattr(info, "replicate_process_group", None)
    reduce_group = getattr(info, "reduce_scatter_process_group", None) or shard_group
    after = group.post_forward_mesh_info
    middle = after is not None and after is not group.mesh_info
    rows, world = int(managed._orig_size[placement.dim]), shard_group.size() if shard_group is not None else 1
    return Sharding(
        rows=rows,
        dim=placement.dim,
        group=_name(shard_group),
        world=world,
        reduce_group=_name(reduce_group),
        replicas=_name(replica_group),
        copies=replica_group.size() if replica_group is not None else 1,
        pieces=after.shard_mesh_size if middle else 1,
        piece_group=_name(after.shard_process_group) if middle else "",
        param_dtype=param_dtype,
        reduce_dtype=policy.reduce_dtype or param_dtype,
        divisor="" if group.gradient_divide_factor is None else repr(float(group.gradient_divide_factor)),
        budget="" if peak_memory_bytes is None else str(peak_memory_bytes),
        padded_shape=None if rows % world == 0 else tuple(managed.padded_sharded_param_size),
        inner=None if inner is None else (inner.mesh, inner.placements, inner.shape, inner.stride),
    )


def _name(group: Any) -> str:
    return "" if group is None else str(group.group_name)


def _check_placements(name: str, placement: Any, inner: Any) -> None:
    placements = (placement, *(inner.placements if inner is not None else ()))
    for one in placements:
        if type(one) not in (Shard, Replicate):
            raise DCompileError(
                f"fully_sharded: parameter {name} is placed as {one!r}, which the compiled program does not see "
                "through; use Shard or Replicate, or run this model in eager FSDP2"
            )


def _check_mesh(name: str, mesh: Any) -> None:
    """Whether this rank is in ``mesh``, and all its ranks are in this job."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = sorted(int(member) for member in mesh.mesh.flatten())
    if rank not in ranks:
        raise DCompileError(
            f"fully_sharded: rank {rank} has no part of parameter {name}, whose mesh has the ranks {ranks}; give "
            "fully_shard a mesh that this rank is in, or leave the model out on this rank"
        )
    if ranks[-1] >= world:
        raise DCompileError(
            f"fully_sharded: the mesh of parameter {name} has the ranks {ranks} and the job {world} ranks; make mesh "
            "and model again after the process group"
        )


def piece_position(group: Any, device: torch.device) -> torch.Tensor:
    """This rank's number among those that keep pieces, as a tensor; 0 if there are none."""
    after = group.post_forward_mesh_info
    middle = after is not None and after is not group.mesh_info
    return torch.tensor([after.shard_mesh_rank if middle else 0], device=device)


def shadow_settings(child: FSDPModule, reset: Callable[[], None], update: Callable[[], None]) -> None:
    """From here on ``child``'s own methods say what a compiled program does not follow.

    Args:
        reset: drops unreduced gradients.
        update: takes over what has changed for all passes to come: process groups, divisors, unused parameters.
    """
    where = type(child).__name__
    for name, instead in REFUSED.items():
        if hasattr(child, name):
            setattr(child, name, functools.partial(_refused, where, name, instead))
    for name, reason in DECIDED_HERE.items():
        if hasattr(child, name):
            setattr(child, name, functools.partial(_without_effect, getattr(child, name), name, reason))
    child.set_post_optim_event = _wait_for  # type: ignore[method-assign]
    if hasattr(child, "reset_iter_state"):
        child.reset_iter_state = reset  # type: ignore[method-assign]
    for name in ("set_gradient_divide_factor", "set_separate_reduce_scatter_group", "set_reduce_scatter_unused_params"):
        if hasattr(child, name):
            setattr(child, name, functools.partial(_after, getattr(child, name), update))
    state: Any = child._get_fsdp_state()
    state._pre_forward = functools.partial(
        _refused, where, "register_fsdp_forward_method", "call the method from forward, without registering it"
    )
    for name in _settings_without_effect(state):
        _warn(name, DECIDED_HERE[name])


def _settings_without_effect(state: Any) -> Iterator[str]:
    """Which of ``DECIDED_HERE`` were called before."""
    if state._states_to_forward_prefetch:
        yield "set_modules_to_forward_prefetch"
    if state._states_to_backward_prefetch:
        yield "set_modules_to_backward_prefetch"
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is None:
            continue
        if not group.reshard_after_backward:
            yield "set_reshard_after_backward"
        if getattr(group, "reduce_scatter_max_input_buffers", 1) != 1:
            yield "set_reduce_scatter_max_input_buffers"
        kinds = {type(group._all_gather_comm).__name__, type(group._reduce_scatter_comm).__name__}
        if any(kind.startswith("ProcessGroupAlloc") for kind in kinds):
            yield "set_allocate_memory_from_process_group_for_comm"
        if any(kind.startswith("SymmMem") for kind in kinds):
            yield "set_symm_mem_for_comm"


def _refused(where: str, name: str, instead: str, *_: Any, **__: Any) -> Any:
    raise DCompileError(f"fully_sharded: {where}.{name} is not followed by the compiled program; {instead}")


def _without_effect(original: Callable[..., Any], name: str, reason: str, *args: Any, **kwargs: Any) -> Any:
    _warn(name, reason)
    return original(*args, **kwargs)


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"dcompile: {name} has no effect on the compiled program: {reason}", stacklevel=3)


def _wait_for(event: Any) -> None:
    """Everything this rank launches from here on follows the event: a gather cannot overtake the optimizer."""
    if torch.accelerator.is_available():
        torch.accelerator.current_stream().wait_event(event)


def _after(original: Callable[..., Any], then: Callable[[], None], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    then()


def replace_hooks(child: FSDPModule) -> None:
    """In place of FSDP2's hooks on one module: the casts of its mixed-precision policy. Other hooks stay, in their
    order."""
    state: Any = child._get_fsdp_state()
    policy, module = state._mp_policy, cast(nn.Module, child)
    casts_inputs = policy.cast_forward_inputs and policy.param_dtype is not None
    before = functools.partial(_cast_inputs, policy.param_dtype) if casts_inputs else None
    after = functools.partial(_cast_output, policy.output_dtype) if policy.output_dtype is not None else None
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for one in getattr(handle, "handles", (handle,)):  # modules that form one group share a handle
            _replace(one, module._forward_pre_hooks, before)
            _replace(one, module._forward_hooks, after)


def _replace(handle: Any, hooks: Any, hook: Callable[..., Any] | None) -> None:
    """Put ``hook`` where the hook of ``handle`` is among ``hooks``, or take that one away."""
    if handle.hooks_dict_ref() is not hooks or handle.id not in hooks:
        return
    if hook is None:
        handle.remove()
    else:
        hooks[handle.id] = hook


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return cast_floating(args, dtype), cast_floating(kwargs, dtype)


def _cast_output(dtype: torch.dtype, _: nn.Module, __: Any, output: Any) -> Any:
    return cast_floating(output, dtype)


def cast_floating(item: Any, dtype: torch.dtype) -> Any:
    """``item`` with all floating-point tensors in it in ``dtype``."""
    return map_tensors(item, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def map_tensors(item: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``item``, tensors in nested containers, with ``change`` applied to each tensor."""
    if isinstance(item, torch.Tensor):
        return change(item)
    if isinstance(item, dict):
        return type(item)((key, map_tensors(value, change)) for key, value in item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(map_tensors(value, change) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(map_tensors(value, change) for value in item)
    return item
