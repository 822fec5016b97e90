"""Is a compiled training step as good as eager's? Both are held against the same step in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

import dcompile
from benchmarks.models import Step
from dcompile.counters import Counters

LOSS_RTOL = 1e-6
"""A float32 loss of these models, any order of summation: measured up to 2e-7."""

TIMES_EAGER, OF_LARGEST = 8.0, 2e-6
"""A gradient may be ``TIMES_EAGER`` as far from float64 as eager's is, plus this share of the model's largest gradient.
The share is for gradients that are zero but for rounding, like that of a bias before a norm."""

Gradients = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients of one step, in float64; buffers as the step leaves them."""

    loss: torch.Tensor
    gradients: Gradients
    buffers: dict[str, torch.Tensor]


def outcome(module: nn.Module, call: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Outcome:
    """Run the step of ``module`` through ``call``."""
    loss = call(*inputs)
    loss.backward()
    gradients = {n: None if p.grad is None else p.grad.double() for n, p in module.named_parameters()}
    return Outcome(loss.detach().double(), gradients, dict(module.named_buffers()))


def exact(step: Step) -> Outcome:
    """The step in float64."""
    module = copy.deepcopy(step.module).double()
    for part in module.modules():
        if hasattr(part, "experts") and hasattr(part.experts, "config"):
            part.experts.config._experts_implementation = "eager"  # the library's grouped matmul takes no float64
    return outcome(module, module, tuple(x.double() if x.is_floating_point() else x for x in step.inputs))


def judge(step: Step) -> Counters:
    """Assert that the compiled step gives eager's loss, gradients and buffers; returns what compiling it took."""
    right = exact(step)
    eager_module = copy.deepcopy(step.module)
    eager = outcome(eager_module, eager_module, step.inputs)
    torch._dynamo.reset()
    dcompile.reset_counters()
    found = outcome(step.module, dcompile.compile(step.module), step.inputs)
    torch.testing.assert_close(found.loss, eager.loss, rtol=LOSS_RTOL, atol=0)
    assert [n for n, g in found.gradients.items() if g is None] == [n for n, g in right.gradients.items() if g is None]
    largest = max(g.abs().max() for g in right.gradients.values() if g is not None)
    for name, gradient in found.gradients.items():
        if gradient is not None:
            true, other = right.gradients[name], eager.gradients[name]
            assert true is not None
            assert other is not None
            error, allowed = (gradient - true).abs().max(), TIMES_EAGER * (other - true).abs().max()
            assert error <= allowed + OF_LARGEST * largest, f"{name}: {error:.2e} from float64, eager {allowed:.2e}"
    for name, buffer in found.buffers.items():
        torch.testing.assert_close(buffer, eager.buffers[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    return dcompile.counters()
