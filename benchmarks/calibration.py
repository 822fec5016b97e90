"""How well calibrated prices foretell collectives: predicted against measured times at sizes between those measured.

    python benchmarks/calibration.py

Starts two CPU ranks (gloo), calibrates without a cache, and times every kind at sizes that were not calibrated. Writes
``benchmarks/results/<date>-calibration.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcompile.analyse.cost import GLOO_LOOPBACK
from dcompile.runtime.calibrate import KINDS, _prepared, _timed_us, calibrate, undisturbed
from dcompile.runtime.comm import Team

SIZES = tuple(int(12e3 * 3.1**n) for n in range(7))


def measure(rank: int, repeats: int) -> dict[str, Any]:
    began = time.perf_counter()
    found = calibrate(None, None, 120.0)
    seconds = time.perf_counter() - began
    world = dist.group.WORLD
    assert world is not None
    team, device = Team("all", world, rank, dist.get_world_size()), torch.device("cpu")
    link = found.link(GLOO_LOOPBACK)
    rows = []
    for kind in KINDS:
        for size in SIZES:
            run = _prepared(kind, size, team, device)
            times = [_timed_us(run, device) for _ in range(repeats)]
            measured = undisturbed(times[1:])
            predicted = link.transfer_us(kind, size, team.size)
            rows.append({"kind": kind.value, "bytes": size, "measured_us": measured, "predicted_us": predicted})
    return {"seconds": seconds, "contention": found.contention, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=13)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.multi_gpu.ranks import run_ranks

    found = run_ranks(measure, options.repeats, deadline_s=240)[0]
    errors = [abs(row["predicted_us"] - row["measured_us"]) / row["measured_us"] for row in found["rows"]]
    summary = {"median_error": statistics.median(errors), "calibration_seconds": found["seconds"]}
    print(json.dumps(summary))
    text = json.dumps({"summary": summary, "torch": torch.__version__, **found}, indent=1)
    options.results.mkdir(exist_ok=True)
    (options.results / f"{date.today()}-calibration.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
