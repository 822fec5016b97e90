"""Training steps of the benchmark models, eager and compiled in turns in one process, by the time of one core.

    python benchmarks/models_turns.py [MODEL ...]

A step is forward, loss and backward on one thread; what counts is the processor time of that thread, which other
programs on the machine disturb less than wall time. Both sides share the process and so its allocator: eager PyTorch
has the memory that ``keep_memory`` keeps, too. ``models_cpu.py`` measures separate processes by wall time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import torch

import dcompile
from benchmarks.models import MODELS, build

DROPOUT = 0.1
SETTLING_STEPS = 2
LEAST_STEPS = 5


def measure(model: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each step of both sides; turns are taken for about ``seconds`` of wall time."""
    torch.compiler.reset()
    built = build(model, "bench", DROPOUT)
    sides: dict[str, Callable[..., Any]] = {"eager": built.module, "dcompile": dcompile.compile(built.module)}

    def step(call: Callable[..., Any]) -> float:
        built.module.zero_grad(set_to_none=True)
        began = time.thread_time()
        call(*built.inputs).backward()
        return time.thread_time() - began

    for _ in range(SETTLING_STEPS):
        for call in sides.values():
            step(call)
    taken: dict[str, list[float]] = {side: [] for side in sides}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken["eager"]) < LEAST_STEPS:
        for side, call in sides.items():
            taken[side].append(step(call))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=list(MODELS), metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=10, help="of turns for each model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ratios = []
    for model in given.models:
        taken = measure(model, given.seconds)
        eager, ours = (statistics.median(seconds) * 1e3 for seconds in taken.values())
        best = min(taken["eager"]) / min(taken["dcompile"])
        ratios.append(eager / ours)
        figures = f"eager {eager:7.1f} ms  dcompile {ours:7.1f} ms  {eager / ours:.3f}  best {best:.3f}"
        print(f"{model:10} {figures}  {len(taken['eager'])} steps", flush=True)
    print(f"geometric mean {math.exp(statistics.fmean(map(math.log, ratios))):.3f} of {len(ratios)} models")


if __name__ == "__main__":
    main()
