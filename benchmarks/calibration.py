"""How well calibrated prices foretell collectives: predicted against measured times at sizes between those measured.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --backend nccl        # on two GPUs

Starts two ranks, calibrates without a cache, and times every kind in the same way at sizes that were not calibrated.
Writes ``benchmarks/results/<date>-calibration-<backend>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcompile.analyse.cost import GLOO_LOOPBACK, NCCL_NVLINK
from dcompile.runtime.agree import exchange
from dcompile.runtime.calibrate import KINDS, calibrate, measured_us
from dcompile.runtime.comm import Team

SIZES = tuple(int(12e3 * 3.1**n) for n in range(7))


def measure(rank: int, backend: str) -> dict[str, Any]:
    began = time.perf_counter()
    found = calibrate(None, None, 120.0)
    seconds = time.perf_counter() - began
    world = dist.group.WORLD
    assert world is not None
    team = Team("all", world, rank, dist.get_world_size())
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    link = found.link(NCCL_NVLINK if backend == "nccl" else GLOO_LOOPBACK)
    talk = exchange(team, 120.0, "benchmark")
    measured = measured_us([(kind, size) for kind in KINDS for size in SIZES], team, device, talk.all)
    rows = []
    for (kind, size), us in measured.items():
        predicted = link.transfer_us(kind, size, team.size)
        rows.append({"kind": kind.value, "bytes": size, "measured_us": us, "predicted_us": predicted})
    curves = {kind.value: points for kind, points in found.curves.items()}
    return {"seconds": seconds, "contention": found.contention, "curves": curves, "rows": rows}


def error_of(row: dict[str, Any]) -> float:
    return abs(float(row["predicted_us"]) - row["measured_us"]) / float(row["measured_us"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    from tests.multi_gpu.ranks import run_ranks

    load = os.getloadavg()[0]
    found = run_ranks(measure, options.backend, world=options.ranks, backend=options.backend, deadline_s=240)[0]
    errors = [error_of(row) for row in found["rows"]]
    by_kind = {kind.value: [error_of(row) for row in found["rows"] if row["kind"] == kind.value] for kind in KINDS}
    summary = {"backend": options.backend, "ranks": options.ranks, "median_error": statistics.median(errors)}
    summary |= {"largest_error": max(errors), "calibration_seconds": found["seconds"], "load_before": load}
    summary["median_error_by_kind"] = {kind: statistics.median(values) for kind, values in by_kind.items()}
    print(json.dumps(summary))
    text = json.dumps({"summary": summary, "torch": torch.__version__, "cores": os.cpu_count(), **found}, indent=1)
    options.results.mkdir(exist_ok=True)
    (options.results / f"{date.today()}-calibration-{options.backend}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
