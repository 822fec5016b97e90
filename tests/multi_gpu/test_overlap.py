"""Overlap of the example's GPT on two gloo ranks: in the plan, in the prediction, and in the measured timeline."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, View
from dcompile.plan import Prediction
from dcompile.runtime.timeline import Timeline
from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank

BUCKET_BYTES = 64 * 2**10
"""Small enough for several buckets: the model below has about 700 KiB of gradients."""

MATMULS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")


@dataclass(frozen=True)
class Trained:
    """What one rank saw of a training step: its backward graph as it is run, and what came of it."""

    graph: Graph
    prediction: Prediction
    gradients: list[Tensor]
    timeline: Timeline | None


def _train(rank: int, variants: dict[str, tuple[dict[str, Any], dict[str, str]]]) -> dict[str, Trained]:
    """One training step with each set of options and environment variables."""
    return {name: _step(rank, options, environment) for name, (options, environment) in variants.items()}


def _step(rank: int, options: dict[str, Any], environment: dict[str, str]) -> Trained:
    import dcompile
    from dcompile.backend import backend
    from dcompile.pipeline import Built
    from dcompile.runtime.timeline import last_timelines
    from examples.train_gpt import GPT, VOCAB, Shape

    os.environ.update(environment)
    chosen = dcompile.Options.from_env({"bucket_bytes": BUCKET_BYTES, "cache_dir": None, **options})
    for name in environment:
        del os.environ[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    model = GPT(Shape(layers=3, width=64, heads=2, context=64))
    seen: list[Built] = []
    compiled = torch.compile(dcompile.data_parallel(model), backend=backend(chosen, seen.append))
    tokens = torch.randint(VOCAB, (8, 65), generator=torch.Generator().manual_seed(rank))
    compiled(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
    (plan,) = (built.plan for built in seen if built.name.startswith("backward"))
    assert plan is not None
    assert plan.prediction is not None
    lines = [line for line in last_timelines() if line.program.startswith("backward")] if chosen.timeline else []
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return Trained(plan.graph, plan.prediction, gradients, lines[-1] if lines else None)
