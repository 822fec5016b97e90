"""Eager DDP, DDP with Inductor and dcompile on two CPU ranks with one thread each, on the model of the example.

    python benchmarks/ddp_cpu.py

Every measurement is a job of fresh processes. Cold: caches in empty folders. Warm: a second job that finds the caches
of the first. The backends take turns, so that a change of the machine's speed touches all of them. Compile seconds are
those of the first training step less the median of the later ones, so imports and process start are not in them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from examples.train_gpt import GPT, PRESETS, batch_of, parallel, shape_of, standard_library

BACKENDS = ("eager", "inductor", "dcompile")
RANKS = 2
SETTLING_STEPS = 2
"""Steps after the first that do not count: allocator and caches of the processor reach their steady state in them."""

JOB_LIMIT_S = 900
"""Longest a job may take: far above the slowest compile measured (37 s), so that it ends only what hangs."""

LOSS_TOLERANCE = 1e-4
"""Largest relative difference to eager's loss that counts as equal: float32 sums in another order differ by about 1e-6
a step, and the steps of a run add up."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--preset", choices=tuple(PRESETS), default="small")
    for size in ("layers", "width", "heads"):
        add(f"--{size}", type=int)
    add("--context", type=int, help="tokens in a sequence (default: 128, or the preset's if that is less)")
    add("--batch", type=int, default=4, help="sequences per rank and step")
    add("--steps", type=int, default=15, help="training steps of each job")
    add("--repetitions", type=int, default=3)
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    add("--worker", nargs=2, metavar=("BACKEND", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    given.context = given.context or min(128, PRESETS[given.preset].context)
    if given.steps < SETTLING_STEPS + 2:
        parser.error(f"--steps must be at least {SETTLING_STEPS + 2}")
    return given


# ---------------------------------------------------------------------------------------------------- one rank of a job


def train(given: argparse.Namespace, backend: str, *, timeline: bool = False) -> dict[str, Any]:
    """Seconds of each step of this rank, and the loss of each step averaged over the ranks of the default group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = shape_of(given)
    model = GPT(shape)
    called = parallel(model, backend, torch.device("cpu"), timeline=timeline)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    text = standard_library()
    seconds, losses = [], []
    for step in range(given.steps):
        batch = batch_of(text, given.batch, shape.context, seed=0, rank=rank, step=step)
        dist.barrier()
        began = time.perf_counter()
        loss = called(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    dist.barrier()  # gloo's threads drop their last tensors while this one waits; in the destructor they would deadlock
    return {"seconds": seconds, "losses": losses}


def work(given: argparse.Namespace) -> None:
    """One rank: trains; rank 0 writes what ``train`` found."""
    backend, file = given.worker
    dist.init_process_group("gloo")
    found = train(given, backend)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- the comparison


def measure(given: argparse.Namespace, backend: str, caches: Path) -> dict[str, Any]:
    """One job: seconds of the first step, compile seconds, median milliseconds of a later step, losses.

    Raises:
        RuntimeError: the job failed or took longer than ``JOB_LIMIT_S``; carries the end of its standard error.
    """
    file = caches / "measured.json"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "DCOMPILE_CACHE_DIR": str(caches / "dcompile"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
    }
    command = [sys.executable, "-m", "dcompile_launch", "--nproc", str(RANKS)]
    command += [str(Path(__file__).resolve()), "--worker", backend, str(file), *model_flags(given)]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = job.communicate(timeout=JOB_LIMIT_S)
    except subprocess.TimeoutExpired:
        job.terminate()  # the launcher then stops its ranks
        _, errors = job.communicate()
    if job.returncode != 0:
        raise RuntimeError(f"the {backend} job ended with exit code {job.returncode}:\n{errors[-8000:]}")
    measured = json.loads(file.read_text())
    file.unlink()
    first_s, later_s = measured["seconds"][0], measured["seconds"][1 + SETTLING_STEPS :]
    step_s = statistics.median(later_s)
    return {
        "first_step_s": first_s,
        "compile_s": max(0.0, first_s - step_s),
        "step_ms": step_s * 1e3,
        "fastest_step_ms": min(later_s) * 1e3,
        "losses": measured["losses"],
    }


def model_flags(given: argparse.Namespace) -> list[str]:
    flags = ["--preset", given.preset, "--steps", str(given.steps), "--batch", str(given.batch)]
    for size in ("layers", "width", "heads", "context"):
        if getattr(given, size):
            flags += [f"--{size}", str(getattr(given, size))]
    return flags


def compare(given: argparse.Namespace, say: Console) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All jobs: for each backend its cold and its warm measurements, one for each repetition."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"cold": [], "warm": []} for name in given.backends}
    for repetition in range(given.repetitions):
        turn = repetition % len(given.backends)
        for backend in given.backends[turn:] + given.backends[:turn]:
            with tempfile.TemporaryDirectory(prefix="ddp_cpu-") as folder:
                for state in ("cold", "warm"):
                    measured = measure(given, backend, Path(folder))
                    found[backend][state].append(measured)
                    say.print(
                        f"repetition {repetition + 1} of {given.repetitions}  {backend:>8} {state}  "
                        f"first step {measured['first_step_s']:6.2f} s  then {measured['step_ms']:7.1f} ms"
                    )
    return found


def summarise(found: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """One row for each backend: medians over the repetitions, and the largest relative difference to eager's losses."""
    rows = []
    reference = found["eager"]["cold"][0]["losses"] if "eager" in found else None
    for backend, by_state in found.items():
        runs = by_state["cold"] + by_state["warm"]
        row: dict[str, Any] = {"backend": backend, "step_ms": statistics.median(run["step_ms"] for run in runs)}
        for state, measured in by_state.items():
            for quantity in ("compile_s", "first_step_s"):
                row[f"{state}_{quantity}"] = statistics.median(run[quantity] for run in measured)
        if reference:
            pairs = [pair for run in runs for pair in zip(run["losses"], reference, strict=True)]
            row["loss_difference"] = max(abs(loss - eager) / abs(eager) for loss, eager in pairs)
            row["losses_equal"] = row["loss_difference"] <= LOSS_TOLERANCE
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("backend", title=title)
    for heading in (
        "cold compile s",
        "warm compile s",
        "cold first step s",
        "warm first step s",
        "step ms",
        "loss vs eager",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        difference = f"{row['loss_difference']:.0e}" if "loss_difference" in row else "-"
        seconds = [
            row[f"{state}_{quantity}"] for quantity in ("compile_s", "first_step_s") for state in ("cold", "warm")
        ]
        table.add_row(row["backend"], *(f"{value:.2f}" for value in seconds), f"{row['step_ms']:.1f}", difference)
    return table


def surroundings() -> dict[str, Any]:
    """Hardware and versions, for the result file."""
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    compiler = os.environ.get("CXX") or "g++"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return {
        "hardware": {
            "processor": models[0] if models else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "versions": {
            "revision": revision.strip(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": version,
            "system": platform.platform(),
        },
    }


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.worker:
        work(given)
        return 0
    say = Console(highlight=False)
    found = compare(given, say)
    rows = summarise(found)
    shape = shape_of(given)
    say.print(table_of(rows, f"{RANKS} CPU ranks, 1 thread each; {shape}, batch {given.batch}; medians"))
    today = datetime.date.today().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"{today}-ddp_cpu.json"
    arguments = sys.argv[1:] if argv is None else argv
    record = {
        "date": today,
        "command": shlex.join(["python", "benchmarks/ddp_cpu.py", *arguments]),
        **surroundings(),
        "ranks": RANKS,
        "shape": vars(shape),
        "batch": given.batch,
        "summary": rows,
        "measurements": found,
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    say.print(f"written: {file.name} in {given.results.name}")
    unequal = [row["backend"] for row in rows if row.get("losses_equal") is False]
    if unequal:
        say.print(f"losses differ from eager's by more than {LOSS_TOLERANCE}: {', '.join(unequal)}")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
