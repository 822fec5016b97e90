"""What a rank can see of its communication: the table of ``explain`` and a trace of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


def _see(rank: int, folder: str) -> tuple[Any, str, dict[str, Any]]:
    import dcompile

    ops, group = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def step(x: Tensor, w: Tensor) -> Tensor:
        pending = ops.all_reduce(x * 2, "sum", group)
        product = w @ w
        return ops.wait_tensor(pending) + product

    x, w = torch.randn(256, 256), torch.randn(256, 256)
    found = dcompile.explain(step, x, w)
    dcompile.trace(f"{folder}/trace{{rank}}.json", step, x, w)
    return found.graphs[0].collectives, str(found), json.loads((Path(folder) / f"trace{rank}.json").read_text())


def test_each_collective_has_a_row_and_a_place_in_the_trace(tmp_path: Path) -> None:
    for rows, text, trace in run_ranks(_see, str(tmp_path), deadline_s=120):
        (row,) = rows
        assert (row.kind, row.group, row.nbytes) == ("all_reduce.sum", "g0[2]", 256 * 256 * 4)
        assert row.predicted_us > 0
        assert row.measured_us > 0
        assert row.waited_us is not None
        assert any(name.startswith("extern") for name, _ in row.hidden_by)
        assert "hidden by" in text
        events = trace["traceEvents"]
        lanes = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
        assert {(0, "compute"), (0, "g0"), (1, "compute"), (1, "g0"), (0, "exposed")} <= lanes
        waits = [e for e in events if e.get("args", {}).get("reason")]
        assert {e["pid"] for e in waits} <= {0, 1}
        assert waits, "time stood still is marked with its reason"
        assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
