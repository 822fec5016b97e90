"""``dcompile simulate``: a script as one of thousands of ranks, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcompile.simulation import Forecast, GraphForecast

ROOT = Path(__file__).parents[2]
BOARDS = ROOT / "benchmarks" / "topologies" / "gpu_boards.toml"

SCRIPT = """\
import sys
import torch
import torch.distributed as dist
import dcompile

dist.init_process_group("gloo")
assert dist.get_world_size() == int(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters())
step = torch.compile(dcompile.data_parallel(model), backend="dcompile")
for _ in range(2):
    step(torch.randn(64, 256)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
dist.destroy_process_group()
"""

PARAMETER_BYTES = 4 * (256 * 256 + 256) * 4


def simulate(folder: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "dcompile.simulation", "simulate", "--ranks", str(ranks)]
    command += ["--topology", str(BOARDS), *more, str(script), str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DCOMPILE_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def forecast(folder: Path, ranks: int) -> dict[str, Any]:
    done = simulate(folder, ranks, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_more_ranks_communicate_longer_and_need_the_same_memory(tmp_path: Path) -> None:
    small, large = forecast(tmp_path, 8), forecast(tmp_path, 4096)
    assert [g["name"] for g in small["graphs"]] == [g["name"] for g in large["graphs"]] == ["forward0", "backward0"]
    for found in (small, large):
        forward, backward = found["graphs"]
        assert forward["collectives"] == 0
        assert backward["collectives"] >= 1
        assert 0 < backward["exposed_us"] <= backward["communication_us"]
        assert backward["lower_bound_us"] <= backward["step_us"] <= backward["program_order_us"]
        assert forward["input_bytes"] >= PARAMETER_BYTES
        assert found["optimizer_bytes"] == pytest.approx(2 * PARAMETER_BYTES, rel=0.01)
    assert large["graphs"][1]["communication_us"] > 2 * small["graphs"][1]["communication_us"], "a network, not NVLink"
    for one, other in zip(small["graphs"], large["graphs"], strict=True):
        assert one["input_bytes"] == other["input_bytes"]


def test_the_forecast_is_readable() -> None:
    forward = GraphForecast("forward0", 2000.0, 2000.0, 0.0, 0.0, 2000.0, 2000.0, 0, 3_000_000, 1_000_000)
    backward = GraphForecast("backward0", 6000.0, 4000.0, 5000.0, 2000.0, 9000.0, 5000.0, 7, 5_000_000, 2_000_000)
    found = Forecast(16, "two boards", (forward, backward), 8_000_000, ("inference3",))
    assert (found.step_us, found.exposed_us, found.memory_bytes) == (8000.0, 2000.0, 15_000_000)
    lines = str(found).splitlines()
    assert lines[0] == "16 ranks on two boards; milliseconds and megabytes of one rank"
    assert lines[3].split() == ["backward0", "6.000", "4.000", "5.000", "2.000", "9.000", "7.0"]
    assert lines[4] == (
        "step 8.000 ms, 25.0% of it exposed communication; memory 15.0 MB, of it 8.0 MB optimizer state"
    )
    assert lines[-1] == "not compiled, not priced: inference3"


@pytest.mark.slow
def test_mistakes_are_explained(tmp_path: Path) -> None:
    done = simulate(tmp_path, 100_000)
    assert done.returncode != 0
    assert "joins at most 65536 ranks" in done.stderr
