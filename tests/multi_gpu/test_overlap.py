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


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Trained]]:
    variants = {
        "overlap": ({"timeline": True}, {}),
        "skipped by option": ({"skip": {"overlap"}}, {}),
        "skipped by environment": ({}, {"DCOMPILE_SKIP": "overlap"}),
    }
    return run_ranks(_train, variants, deadline_s=150)


def _is_matmul(node: Node) -> bool:
    return isinstance(node, Extern) and node.op.startswith(MATMULS)


def _launches_and_last_matmul(graph: Graph) -> tuple[list[int], int]:
    starts = [position for position, node in enumerate(graph.nodes) if isinstance(node, Start)]
    return starts, max(position for position, node in enumerate(graph.nodes) if _is_matmul(node))


def _reads(graph: Graph, wait: Wait) -> int:
    """Position of the first step that reads what ``wait`` gives, directly or through views; the end if only outputs."""
    names = {out.name for out in wait.outs}
    for position, node in enumerate(graph.nodes):
        if names & set(node.operands):
            if not isinstance(node, View):
                return position
            names |= {found.name for found in node.defs}
    return len(graph.nodes)


def _steps_between_waits_and_readers(graph: Graph) -> list[Node]:
    """Steps that run after some wait and before its first reader, though they are no first reader themselves."""
    waits = {position: node for position, node in enumerate(graph.nodes) if isinstance(node, Wait)}
    reader = {position: _reads(graph, node) for position, node in waits.items()}
    between = {step for position in waits for step in range(position + 1, reader[position])}
    return [
        graph.nodes[p] for p in sorted(between - set(reader.values())) if not isinstance(graph.nodes[p], View | Wait)
    ]


def test_all_reduces_start_before_the_last_matmul(trained: list[dict[str, Trained]]) -> None:
    for rank in trained:
        starts, matmul = _launches_and_last_matmul(rank["overlap"].graph)
        assert len(starts) >= 5, "several buckets"
        assert starts[0] < matmul
        assert sum(start < matmul for start in starts) >= len(starts) - 1
        late, matmul = _launches_and_last_matmul(rank["skipped by option"].graph)
        assert len(late) == len(starts)
        assert late[0] > matmul, "in program order nothing is hidden"


def test_waits_stand_directly_before_their_first_reader(trained: list[dict[str, Trained]]) -> None:
    for rank in trained:
        graph = rank["overlap"].graph
        assert sum(isinstance(node, Wait) for node in graph.nodes) >= 5
        assert not _steps_between_waits_and_readers(graph)
        assert _steps_between_waits_and_readers(rank["skipped by option"].graph)


def test_the_measured_timeline_shows_communication_under_compute(trained: list[dict[str, Trained]]) -> None:
    for rank in trained:
        timeline = rank["overlap"].timeline
        assert timeline is not None
        starts, _ = _launches_and_last_matmul(rank["overlap"].graph)
        flights = [span for span in timeline.spans if span.lane not in ("compute", "wait")]
        matmuls = [span for span in timeline.spans if span.lane == "compute" and "aten.mm" in span.name]
        waits = [span for span in timeline.spans if span.lane == "wait"]
        assert len(flights) == len(waits) == len(starts)
        end_us = max(span.end_us for span in matmuls)
        assert min(span.start_us for span in flights) < end_us
        assert sum(span.start_us < end_us for span in flights) >= len(flights) - 1
        assert min(span.start_us for span in waits) >= end_us
        assert timeline.hidden_us > 0


@pytest.mark.parametrize("how", ["skipped by option", "skipped by environment"])
def test_without_overlap_the_numbers_are_the_same_and_the_prediction_is_not_better(
    trained: list[dict[str, Trained]], how: str
) -> None:
    for rank in trained:
        overlapped, skipped = rank["overlap"], rank[how]
        assert len(overlapped.gradients) == len(skipped.gradients) > 30
        for mine, theirs in zip(overlapped.gradients, skipped.gradients, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.any()
        assert skipped.prediction.makespan_us >= overlapped.prediction.makespan_us
        assert overlapped.prediction.makespan_us < overlapped.prediction.program_order_us
        assert skipped.prediction.makespan_us == skipped.prediction.program_order_us
    for mine, theirs in zip(trained[0]["overlap"].gradients, trained[1]["overlap"].gradients, strict=True):
        assert torch.equal(mine, theirs), "both ranks hold the mean"
