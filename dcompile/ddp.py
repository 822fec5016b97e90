"""PyTorch's DistributedDataParallel with its all-reduces inside the compiled backward graph.

Where the compiled program is the whole forward pass of a module under DistributedDataParallel (around the compiled
module, or compiled with it), the averages of its gradients become nodes of the backward graph, which are bucketed and
put beside compute like any others. The reducer stays and keeps its duties (buffers, ``no_sync``, checks); a hook tells
it that what it gathers has been averaged already.

The reducer still averages by itself, as in eager, after a ``no_sync`` stretch, because what was accumulated in
``.grad`` is not part of the program; and for good where the program is not the whole forward pass, where
``find_unused_parameters`` lets ranks differ in the gradients they have, and with a communication hook of the user's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from dcompile.capture import is_forward_of, is_whole_function, parameter_inputs, pass_through
from dcompile.counters import TALLY
from dcompile.runtime.duty import Duty


class _Average(torch.autograd.Function):
    """Identity whose gradient is the mean over the ranks of a duty: scaled first, then summed, as the reducer does."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, group_name: str, world: int) -> torch.Tensor:
        ctx.group_name, ctx.world = group_name, world
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scaled = gradients[0] * (1.0 / ctx.world)
        pending = torch.ops._c10d_functional.all_reduce(scaled, "sum", ctx.group_name)
        return torch.ops._c10d_functional.wait_tensor(pending), None, None


_averages: WeakKeyDictionary[DistributedDataParallel, _Averages] = WeakKeyDictionary()


class _Averages:
    """What is known of one wrapped module.

    Attributes:
        duty: whether compiled backward programs communicate.
        covered: parameters they average.
        gave_up: a part of the module ran outside; the reducer averages from now on.
        behind: ``no_sync`` has left gradients in ``.grad`` that are not averaged.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.duty = Duty(group)
        self.covered: set[int] = set()
        self.gave_up = False
        self.behind = False

    def forward_begins(self, synchronises: bool) -> None:
        """A compiled forward pass that may have a backward pass begins."""
        self.duty.launched = False
        self.duty.alone = self.gave_up or not synchronises or self.behind
        self.behind = not synchronises


def average_in_graph(gm: fx.GraphModule) -> Callable[[], None] | None:
    """Let the gradients of ``gm`` be averaged if it is the forward pass of a module under DistributedDataParallel.

    Args:
        gm: Dynamo's graph, which is changed.

    Returns:
        What must be called before each run of the compiled graph; None if there is nothing to average in it.
    """
    wrapper: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None or not torch.is_grad_enabled() or dist.get_world_size(wrapper.process_group) == 1:
        return None
    inputs = parameter_inputs(gm)
    known = _averages.get(wrapper)
    if reason := _why_outside(gm, wrapper, inputs, known):
        TALLY.add_fallbacks(Counter({f"DistributedDataParallel outside the graph: {reason}": 1}))
        if known is not None:
            known.gave_up = known.duty.alone = True
        return None
    if known is None:
        known = _averages[wrapper] = _Averages(wrapper.process_group)
        # without annotations: PyTorch compares those of a hook with types, not with text
        wrapper.register_comm_hook(known, lambda state, bucket: _already_averaged(state, bucket))
    mine = [p for p in _trained(wrapper) if p in inputs]
    known.covered |= {id(parameter) for parameter in mine}
    world = dist.get_world_size(wrapper.process_group)
    pass_through(gm, {inputs[p].name for p in mine}, _averaged, known.duty.name, world)
    return partial(_begin, wrapper, known)


def _averaged(parameter: torch.Tensor, group_name: str, world: int) -> torch.Tensor:
    average: Any = _Average.apply
    result: torch.Tensor = average(parameter, group_name, world)
    return result


def _begin(wrapper: DistributedDataParallel, known: _Averages) -> None:
    if torch.is_grad_enabled():
        known.forward_begins(bool(wrapper.require_backward_grad_sync))


def _trained(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    ignored = set(getattr(wrapper, "parameters_to_ignore", ()))
    return [p for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored]


def _why_outside(
    gm: fx.GraphModule, wrapper: DistributedDataParallel, inputs: dict[nn.Parameter, fx.Node], known: _Averages | None
) -> str:
    """Why the reducer has to average by itself; "" if it does not."""
    if wrapper.find_unused_parameters:
        return "find_unused_parameters: ranks may differ in the gradients they have"
    if known is None and getattr(wrapper, "_comm_hooks", []):
        return "it has a communication hook"
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "it casts parameters itself (mixed_precision)"
    if not is_whole_function(gm) or not is_forward_of(wrapper.module):
        return "only a part of the forward pass is in the graph"
    if any(parameter not in inputs for parameter in _trained(wrapper)):
        return "the forward pass does not use all parameters"
    return ""


def _already_averaged(known: _Averages, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """The reducer's hook: averages what no compiled program has averaged in this backward pass."""
    buffer = bucket.buffer()
    gradients = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    done = known.duty.launched and all(id(parameter) in known.covered for parameter, _ in gradients)
    if bucket.is_last():
        known.duty.launched = False
    if done:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(buffer)
        return future
    group = known.duty.group
    buffer.mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    assert work is not None, "an asynchronous all-reduce has a work"
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]
