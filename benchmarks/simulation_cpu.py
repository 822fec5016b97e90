"""The forecast of ``dcompile simulate`` beside measured steps of CPU ranks.

    python benchmarks/simulation_cpu.py
    python benchmarks/simulation_cpu.py --ranks 1 2 4        # 4 ranks on 2 cores have half a core each

Measured is what the compiled forward and backward graphs take in a step of ``examples/train_gpt.py``: medians of the
recorded timelines of rank 0, without the first steps. Forecast is the same by
``benchmarks/topologies/loopback_cpu.toml``; ranks that share cores have their part of a core's speed. Writes a file
with date, hardware, versions and command into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGY = ROOT / "benchmarks" / "topologies" / "loopback_cpu.toml"
STEPS, WARM_UP = 12, 4
SIZES = {
    "tiny": ["--preset", "tiny"],
    "medium": ["--layers", "4", "--width", "256", "--heads", "4", "--context", "128"],
}


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "launch")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measured_us(ranks: int, sizes: list[str]) -> dict[str, float]:
    """Median microseconds of a call of each graph, and of a step's standing still for communication."""
    measure = [str(Path(__file__).resolve()), "--measure", "--backend", "dcompile", "--steps", str(STEPS), *sizes]
    text = run(sys.executable, "-m", "dcompile_launch", "--nproc", str(ranks), *measure)
    line = next(line for line in text.splitlines() if line.startswith("MEASURED "))
    return json.loads(line.removeprefix("MEASURED "))  # type: ignore[no-any-return]


def shared_cores(ranks: int, cores: int) -> str:
    """The topology where ``ranks`` share fewer ``cores``: each has its part of the speed, and calls take longer."""
    share = min(1.0, cores / ranks)
    lines = []
    for line in TOPOLOGY.read_text().splitlines():
        of_processor = line.startswith("bytes_per_us") and "[[level]]" not in lines
        if of_processor or line.startswith(("flops_per_us", "launch_us", "call_us")):
            name, value = line.split(" = ")
            line = f"{name} = {float(value) / share if name in ('launch_us', 'call_us') else float(value) * share}"
        elif line.startswith("matmul_flops_per_us"):
            line = re.sub(r"= ([0-9.e]+)", lambda found: f"= {float(found[1]) * share}", line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def forecast(ranks: int, sizes: list[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as topology:
        topology.write(shared_cores(ranks, os.cpu_count() or 1))
        topology.flush()
        command = [sys.executable, "-m", "dcompile.simulation", "simulate", "--json", "--ranks", str(ranks)]
        command += ["--topology", topology.name, str(ROOT / "examples" / "train_gpt.py"), "--steps", "1", *sizes]
        text = run(*command)
    return json.loads(text[text.index("\n{\n") if not text.startswith("{") else 0 :])  # type: ignore[no-any-return]


def measure(argv: list[str]) -> None:
    """One rank: train, then tell what the compiled graphs took."""
    from dcompile.runtime.timeline import last_timelines
    from examples import train_gpt

    train_gpt.main(argv)
    if os.environ["RANK"] == "0":
        calls: dict[str, list[float]] = {}
        exposed: dict[str, list[float]] = {}
        for timeline in last_timelines():
            calls.setdefault(timeline.program, []).append(timeline.total_us)
            exposed.setdefault(timeline.program, []).append(timeline.exposed_us)
        found = {name: statistics.median(times[WARM_UP:]) for name, times in calls.items()}
        found["exposed"] = sum(statistics.median(times[WARM_UP:]) for times in exposed.values())
        print("MEASURED " + json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    given = parser.parse_args()
    rows = []
    for size in given.sizes:
        for ranks in given.ranks:
            real, paper = measured_us(ranks, SIZES[size]), forecast(ranks, SIZES[size])
            step = sum(us for name, us in real.items() if name != "exposed")
            predicted = sum(graph["step_us"] for graph in paper["graphs"])
            exposed = sum(graph["exposed_us"] for graph in paper["graphs"])
            row = {"size": size, "ranks": ranks, "measured_step_us": step, "forecast_step_us": predicted}
            row |= {"oversubscribed": ranks > (os.cpu_count() or 1)}
            row |= {"ratio": predicted / step, "measured_exposed_us": real["exposed"], "forecast_exposed_us": exposed}
            rows.append(row)
            print(json.dumps(row), flush=True)
    import torch

    today = datetime.date.today().isoformat()
    facts = {"date": today, "command": "python benchmarks/simulation_cpu.py", "torch": torch.__version__}
    facts |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts |= {"load_before": os.getloadavg()[0], "rows": rows}
    path = ROOT / "benchmarks" / "results" / f"{today}-simulation_cpu.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        sys.argv.remove("--measure")
        measure(sys.argv[1:])
    else:
        main()
