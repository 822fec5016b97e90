"""Training steps of fifteen models on the CPU: eager, Inductor and dcompile, in one run.

    python benchmarks/models_cpu.py

A step is forward, loss and backward. Every backend of a model is a process of its own. Cold: empty caches. Then the
three processes stay, and their steps are timed in turns, so that a change of the machine's speed touches all of them.
Warm: a new process that finds the caches of the first. Compile seconds are those of the first training step (capture,
compile, forward, backward) less the median of the later ones; imports and process start are not in them. Compile memory
is the highest resident set of the process during its first step, all of it: interpreter, libraries, model and gradients
included. Differences to eager are those of a float32 step without dropout, in a process of their own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import torch
from rich.console import Console
from rich.table import Table

import dcompile
from benchmarks.ddp_cpu import surroundings
from benchmarks.models import MODELS, RANDOM, Scale, build

BACKENDS = ("eager", "inductor", "dcompile")
COMPILERS = BACKENDS[1:]
DROPOUT = 0.1
"""What the published configurations of the models that drop out have."""

SETTLING_STEPS = 2
TURN_S = 0.4
"""Seconds of steps a backend makes in one turn, at least one step."""

WARM_STEPS = 3
ANSWER_LIMIT_S = 600
"""Longest one request to a process may take: far above the slowest compile measured, to end only what hangs."""

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
"""Largest difference to eager that counts as equal: of the loss, relative; of a gradient, by the model's largest one.
Float32 sums in another order differ by about 1e-7 and 1e-5."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--scale", choices=("test", "bench"), default="bench", help="sizes of the models")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every process (default: cores)")
    add("--repetitions", type=int, default=7, help="timed turns of each backend")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    add("--worker", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------- one process of a backend


class Worker:
    """Answers the requests of the parent process, one line of JSON each."""

    def __init__(self, model: str, backend: str, scale: Scale, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.scale, self.backend = model, scale, backend
        self.built = build(model, scale, DROPOUT)
        self.call = called(self.built.module, backend)

    def ready(self) -> None:
        """Answers as soon as everything is imported and the model is built."""

    def step(self) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        self.built.module.zero_grad(set_to_none=True)
        self.call(*self.built.inputs).backward()
        return time.perf_counter() - began

    def first(self) -> dict[str, Any]:
        """The first step, which compiles: its seconds, MiB of memory, and what was compiled."""
        before = resident_mib("VmRSS")
        first_s = self.step()
        found: dict[str, Any] = {
            "first_step_s": first_s,
            "rss_mib": resident_mib("VmHWM"),
            "rss_before_mib": before,
        }
        if self.backend == "dcompile":
            counted = dcompile.counters()
            found["program"] = {
                "kernels": counted.kernels,
                "kernel_launches": counted.kernel_launches,
                "library_calls": counted.library_calls,
                "fallbacks": dict(counted.fallbacks),
                "graph_breaks": counted.graph_breaks,
                "seconds": {stage: round(seconds, 3) for stage, seconds in counted.seconds.items()},
            }
        if self.backend == "inductor":
            from torch._inductor import metrics

            found["program"] = {"kernels": metrics.generated_kernel_count}
        return found

    def steps(self, at_least_s: float, count: int = 1) -> list[float]:
        """Seconds of each of ``count`` or more steps that take ``at_least_s`` together."""
        taken: list[float] = []
        while len(taken) < count or sum(taken) < at_least_s:
            taken.append(self.step())
        return taken

    def difference(self) -> dict[str, float]:
        """Largest differences of loss and gradients to eager's, without dropout."""
        step = build(self.model, self.scale, 0.0)
        eager = copy.deepcopy(step.module)
        losses = []
        for call in (eager, called(step.module, self.backend)):
            loss = call(*step.inputs)
            loss.backward()
            losses.append(float(loss.detach().double()))
        pairs = [(p.grad, q.grad) for p, q in zip(step.module.parameters(), eager.parameters(), strict=True)]
        assert all((a is None) == (b is None) for a, b in pairs), "a gradient is missing, or one too many"
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        largest = max(float(b.abs().max()) for _, b in both)
        return {
            "loss": abs(losses[1] - losses[0]) / abs(losses[0]),
            "gradient": max(float((a - b).abs().max()) for a, b in both) / largest,
        }


def called(module: torch.nn.Module, backend: str) -> Callable[..., Any]:
    if backend == "eager":
        return module
    if backend == "dcompile":
        return dcompile.compile(module)
    return torch.compile(module, backend=backend)


def resident_mib(field: str) -> float:
    """``VmRSS``: now; ``VmHWM``: the most since the process started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) / 1024


def serve(given: argparse.Namespace) -> None:
    """Requests from standard input, answers to the standard output the process was started with."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    worker = Worker(*given.worker, given.scale, given.threads)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(worker, name)(*arguments)) + "\n")
        answers.flush()


# ------------------------------------------------------------------------------------------------------- the comparison


class Client:
    """The parent's side of a worker process."""

    def __init__(self, given: argparse.Namespace, model: str, backend: str, caches: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(given.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "DCOMPILE_CACHE_DIR": str(caches / "dcompile"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
            "TRANSFORMERS_OFFLINE": "1",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", model, backend]
        command += ["--scale", given.scale, "--threads", str(given.threads)]
        self.name = f"{model} with {backend}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by __exit__
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: the process has ended, or does not answer in time; carries the end of its standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], ANSWER_LIMIT_S)[0]:
                line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} gave no answer to {request}:\n{self.errors.read()[-6000:]}")
        return json.loads(line)


def measure(given: argparse.Namespace, model: str, caches: Path) -> dict[str, dict[str, Any]]:
    """All figures of one model, by backend."""
    found: dict[str, dict[str, Any]] = {}
    clients = {backend: Client(given, model, backend, caches) for backend in given.backends}
    try:
        for client in clients.values():
            client.ask("ready")
        for backend, client in clients.items():
            found[backend] = {"cold": client.ask("first"), "turns_s": []}
            client.ask("steps", 0.0, SETTLING_STEPS)
        for turn in range(given.repetitions):
            first = turn % len(clients)
            order = [*clients][first:] + [*clients][:first]
            for backend in order:
                found[backend]["turns_s"].append(statistics.median(clients[backend].ask("steps", TURN_S)))
    finally:
        for client in clients.values():
            client.__exit__()
    for backend in found:
        if backend in COMPILERS:
            with Client(given, model, backend, caches) as client:
                client.ask("ready")
                found[backend]["warm"] = client.ask("first")
                found[backend]["warm_steps_s"] = client.ask("steps", 0.0, WARM_STEPS)
    if "dcompile" in found:
        with Client(given, model, "dcompile", caches) as client:
            found["dcompile"]["difference"] = client.ask("difference")
    return found


def summarise(measured: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each model and backend."""
    rows = []
    for model, by_backend in measured.items():
        for backend, found in by_backend.items():
            step_s = statistics.median(found["turns_s"])
            row: dict[str, Any] = {"model": model, "backend": backend, "step_ms": step_s * 1e3}
            row["rss_mib"] = found["cold"]["rss_mib"]
            if "eager" in by_backend:
                row["speed"] = statistics.median(by_backend["eager"]["turns_s"]) / step_s
            if backend in COMPILERS:
                row["cold_s"] = max(0.0, found["cold"]["first_step_s"] - step_s)
                row["warm_s"] = max(0.0, found["warm"]["first_step_s"] - step_s)
            rows.append({**row, **found.get("difference", {}), **found["cold"].get("program", {})})
    return rows


def totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each backend: geometric mean of the speed by eager, summed compile seconds, most memory."""
    found: dict[str, dict[str, float]] = {}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        found[backend] = {"models": len(own), "rss_mib": max(row["rss_mib"] for row in own)}
        if all("speed" in row for row in own):
            found[backend]["speed"] = math.exp(statistics.fmean(math.log(row["speed"]) for row in own))
        if backend in COMPILERS:
            found[backend]["cold_s"] = sum(row["cold_s"] for row in own)
            found[backend]["warm_s"] = sum(row["warm_s"] for row in own)
    return found


def differing(rows: list[dict[str, Any]]) -> list[str]:
    """Models whose compiled step is not eager's."""
    return [
        row["model"]
        for row in rows
        if not row.get("loss", 0.0) <= LOSS_TOLERANCE or not row.get("gradient", 0.0) <= GRADIENT_TOLERANCE
    ]


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("step ms", "step_ms", ".1f"),
    ("by eager", "speed", ".2f"),
    ("cold s", "cold_s", ".1f"),
    ("warm s", "warm_s", ".1f"),
    ("MiB", "rss_mib", ".0f"),
    ("kernels", "kernels", "d"),
    ("launches", "kernel_launches", "d"),
    ("library", "library_calls", "d"),
    ("loss diff", "loss", ".0e"),
    ("grad diff", "gradient", ".0e"),
)


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table("model", "backend", title=title)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("fallbacks")
    for row in rows:
        cells = [format(row[key], style) if key in row else "" for _, key, style in COLUMNS]
        fallbacks = ", ".join(f"{count} {op}" for op, count in row.get("fallbacks", {}).items())
        table.add_row(row["model"], row["backend"], *cells, fallbacks)
    return table


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.worker:
        serve(given)
        return 0
    say = Console(highlight=False)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for number, model in enumerate(given.models, 1):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="models_cpu-") as folder:
            measured[model] = measure(given, model, Path(folder))
        steps = {backend: statistics.median(found["turns_s"]) * 1e3 for backend, found in measured[model].items()}
        figures = "  ".join(f"{backend} {ms:.1f} ms" for backend, ms in steps.items())
        say.print(f"{number:2} of {len(given.models)}  {model:>9}  {figures}  ({time.perf_counter() - began:.0f} s)")
    rows = summarise(measured)
    summary = totals(rows)
    say.print(table_of(rows, f"One training step, {given.threads} threads, sizes: {given.scale}"))
    for backend, total in summary.items():
        say.print(f"{backend:>9}  " + "  ".join(f"{name} {value:.2f}" for name, value in total.items()))
    today = datetime.date.today().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"{today}-models_cpu-{given.threads}threads.json"
    arguments = sys.argv[1:] if argv is None else argv
    record = {
        "date": today,
        "command": shlex.join(["python", "benchmarks/models_cpu.py", *arguments]),
        **surroundings(),
        "threads": given.threads,
        "dropout": {"probability": DROPOUT, "models": RANDOM},
        "totals": summary,
        "summary": rows,
        "measurements": measured,
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    say.print(f"written: {file.name} in {given.results.name}")
    if wrong := differing(rows):
        say.print(f"not eager's step: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
