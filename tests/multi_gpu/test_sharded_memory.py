"""Peak memory of a fully sharded step: predicted, measured, bounded by the user, and beside eager FSDP2's."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from tests.multi_gpu.ranks import run_ranks

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]

WIDTH, HIDDEN, BLOCKS, TOKENS = 128, 512, 8, 48


SKIP = {"exchange_sums"}
"""Reductions stay reductions, as on GPUs: what gloo's all-to-all uses besides is not known to the plan."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def _model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def _alive_bytes() -> int:
    """Bytes of all storages that some tensor of this process refers to."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def _measured_bytes(step: Any, others: int) -> int:
    """Most bytes alive during ``step``, as the profiler sees PyTorch's allocator, ``others`` not counted."""
    before = _alive_bytes() - others
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def _peaks(rank: int, budgets: dict[str, int | None], folder: str) -> dict[str, Any]:
    """Measured and predicted peak, gathers and gradients for eager FSDP2 and each budget."""
    import dcompile
    from dcompile.backend import observing
    from dcompile.collectives.nodes import Kind, Start
    from dcompile.explanation import Explanation, GraphExplanation

    found: dict[str, Any] = {}
    for name, budget in {"eager": None, **budgets}.items():
        torch.compiler.reset()
        others = _alive_bytes()
        model = _model()
        built: list[Any] = []
        run = model
        if name != "eager":
            run = dcompile.compile(model, fullgraph=True, cache_dir=folder, peak_memory_bytes=budget, skip=SKIP)
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))

        def step(run: Any = run, model: Model = model, x: Tensor = x) -> None:
            run(x).backward()
            for parameter in model.parameters():
                parameter.grad = None

        with observing(built.append):
            run(x).backward()
        gradients = [parameter.grad.to_local().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        step()
        plans = [one.plan for one in built]
        found[name] = {
            "measured": _measured_bytes(step, others),
            "predicted": Explanation(tuple(map(GraphExplanation, built)), 0, None).peak_bytes,
            "programs": [
                (g.name, g.given_bytes, g.plan.peak_bytes, dict(g.plan.arena_bytes))
                for g in map(GraphExplanation, built)
            ],
            "gathers": sum(
                len(node.sources)
                for plan in plans
                for node in plan.graph.nodes
                if isinstance(node, Start) and node.kind is Kind.ALL_GATHER
            ),
            "verdicts": [v.decision for plan in plans for v in plan.verdicts if "peak_memory_bytes=" in v.subject],
            "gradients": gradients,
        }
        del run, model, step, gradients, built, plans
    return found


PARAMETERS = 2 * BLOCKS * (2 * WIDTH * HIDDEN + WIDTH + HIDDEN) * 2
"""Bytes of all gathered parameters, less a rank's own half: float32."""
ROOMY, TIGHT = 5 * PARAMETERS, 3 * PARAMETERS


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    budgets = {"default": None, "roomy": ROOMY, "tight": TIGHT}
    return run_ranks(_peaks, budgets, str(tmp_path_factory.mktemp("cache")), deadline_s=280)


EXACTNESS = {"default": 0.25}
"""How far the prediction may be off: 10 % to 15 % were seen over gloo, 2 % without peers. What is missing are buffers
that gloo makes inside its own calls; how many are alive at once changes from run to run."""


def test_the_predicted_peak_is_near_the_measured_one(peaks: list[dict[str, Any]]) -> None:
    for found in peaks:
        for name, share in EXACTNESS.items():
            measured, predicted = found[name]["measured"], found[name]["predicted"]
            assert abs(predicted - measured) <= share * measured, (name, predicted, measured, found[name]["programs"])


ABOVE_EAGER = 2.0
"""Working memory of forward and backward program is kept side by side, and gloo's flat buffers come on top of it; both
do not grow with the number of blocks."""


def test_the_default_needs_about_as_much_as_eager(peaks: list[dict[str, Any]]) -> None:
    for found in peaks:
        assert found["default"]["measured"] <= ABOVE_EAGER * found["eager"]["measured"]


def test_a_budget_decides_what_stays_gathered(peaks: list[dict[str, Any]]) -> None:
    for found in peaks:
        assert found["roomy"]["gathers"] < found["tight"]["gathers"]
        assert found["roomy"]["measured"] <= ROOMY
        assert set(found["roomy"]["verdicts"]) == {"kept"}


def test_no_budget_changes_the_numbers(peaks: list[dict[str, Any]]) -> None:
    for found in peaks:
        for name in ("default", "roomy", "tight"):
            torch.testing.assert_close(found[name]["gradients"], found["eager"]["gradients"], atol=1e-6, rtol=1e-4)
