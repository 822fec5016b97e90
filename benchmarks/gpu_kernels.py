"""Fused kernels on one GPU: eager PyTorch, Inductor and dcompile in one process, beside the bandwidth of a plain copy.

    PYTHONPATH=.:launch python benchmarks/gpu_kernels.py [--only NAME ...] [--results FOLDER]

Each case names the fewest bytes it must move: inputs read once, results written once. A time is the median over rounds
of calls that are queued without waiting, forward and backward where the case has one, so host time counts only where it
is longer than the GPU's. Sizes are chosen so that it is not. Results and gradients are compared with eager's.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
os.environ.setdefault("DCOMPILE_CACHE_DIR", tempfile.mkdtemp(prefix="dcompile-gpu-"))

import torch
import torch.nn.functional as F
from torch import Tensor

import dcompile
from dcompile.backend import backend
from dcompile.options import Options

BF16, F32 = torch.bfloat16, torch.float32
BACKENDS = ("eager", "inductor", "dcompile", "tuned")
"""``tuned`` is dcompile with ``autotune``."""

ROUNDS, CALLS = 7, 10
"""Timed rounds, and calls queued in each."""


@dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
        function: of tensors, to a tensor or a tuple of tensors.
        inputs: random tensors; those that require a gradient are differentiated.
        nbytes: the fewest bytes forward and backward must move.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    nbytes: int


class Maker:
    """Inputs on the device, smaller by ``scale`` for trying the script out."""

    def __init__(self, device: str, scale: int) -> None:
        self.device, self.scale = device, scale

    def n(self, size: int) -> int:
        return max(size // self.scale, 16)

    def randn(self, *shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).requires_grad_(grad)

    def ids(self, count: int, below: int) -> Tensor:
        return torch.randint(0, below, (count,), device=self.device)


def size(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def cases(m: Maker) -> dict[str, Callable[[], Case]]:
    rows, wide = m.n(65536), m.n(4096)

    def unary(function: Callable[[Tensor], Tensor], grad: bool, passes: int, dtype: torch.dtype = BF16) -> Case:
        x = m.randn(rows, wide, dtype=dtype, grad=grad)
        return Case(function, (x,), passes * size(x))

    def layer_norm() -> Case:
        x, w, b = (
            m.randn(rows, wide, grad=True),
            m.randn(wide, dtype=F32, grad=True),
            m.randn(wide, dtype=F32, grad=True),
        )
        return Case(lambda x, w, b: F.layer_norm(x.float(), (wide,), w, b).to(BF16), (x, w, b), 5 * size(x))

    def rms_norm() -> Case:
        x, w = m.randn(rows, wide, grad=True), m.randn(wide, grad=True)

        def run(x: Tensor, w: Tensor) -> Tensor:
            y = x.float()
            return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(BF16) * w

        return Case(run, (x, w), 5 * size(x))

    def gelu_bias() -> Case:
        x, b = m.randn(rows, wide, grad=True), m.randn(wide, grad=True)
        return Case(lambda x, b: F.gelu(x + b), (x, b), 5 * size(x))

    def swiglu() -> Case:
        x, g = m.randn(rows, wide, grad=True), m.randn(rows, wide, grad=True)
        return Case(lambda x, g: F.silu(g) * x, (x, g), 8 * size(x))

    def cross_entropy(vocabulary: int, tokens: int) -> Case:
        x, ids = m.randn(m.n(tokens), vocabulary // m.scale, grad=True), m.ids(m.n(tokens), vocabulary // m.scale)
        return Case(lambda x, i: F.cross_entropy(x.float(), i), (x, ids), 3 * size(x))

    def rotary() -> Case:
        q = m.randn(m.n(8), 32, m.n(4096) // 2, 128)
        angle = m.randn(q.shape[2], 64, dtype=F32)

        def run(q: Tensor, angle: Tensor) -> Tensor:
            cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
            a, b = q.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return Case(run, (q, angle), 2 * size(q))

    def adamw() -> Case:
        shapes = [(m.n(4096), m.n(4096))] * 4 + [(m.n(4096),)] * 8
        lists = [[m.randn(*shape, dtype=F32) for shape in shapes] for _ in range(4)]

        def run(*flat: Tensor) -> tuple[Tensor, ...]:
            done: list[Tensor] = []
            for p, g, mean, square in zip(*(flat[k::4] for k in range(4)), strict=True):
                mean = mean + (g - mean) * 0.1
                square = square * 0.999 + g * g * 0.001
                done += [p * (1 - 1e-4) - 1e-3 * mean / (square.abs().sqrt() + 1e-8), mean, square]
            return tuple(done)

        inputs = tuple(t for four in zip(*lists, strict=True) for t in four)
        return Case(run, inputs, size(*inputs) * 7 // 4)

    def embedding() -> Case:
        table, ids = m.randn(m.n(32768), 1024, dtype=F32, grad=True), m.ids(m.n(262144), m.n(32768))
        return Case(lambda t, i: F.embedding(i, t), (table, ids), 3 * ids.numel() * 4096 + 2 * size(table))

    def batch_norm() -> Case:
        x = m.randn(m.n(256), 64, 56, 56, grad=True)
        w, b = m.randn(64, dtype=F32, grad=True), m.randn(64, dtype=F32, grad=True)
        return Case(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True).relu(), (x, w, b), 8 * size(x))

    def reduction(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype = F32) -> Case:
        x = m.randn(*(m.n(n) if n > 64 else n for n in shape), dtype=dtype)
        return Case(lambda x: x.square().sum() if dim is None else x.sum(dim), (x,), size(x))

    def transpose(dtype: torch.dtype) -> Case:
        x, y = m.randn(2 * wide, 2 * wide, dtype=dtype), m.randn(2 * wide, 2 * wide, dtype=dtype)
        return Case(lambda x, y: x.t() + y, (x, y), 3 * size(x))

    def cumsum() -> Case:
        x = m.randn(rows // 4, wide, dtype=F32)
        return Case(lambda x: x.cumsum(-1), (x,), 2 * size(x))

    return {
        "softmax": lambda: unary(lambda x: torch.softmax(x.float(), -1).to(BF16), True, 5),
        "layer norm": layer_norm,
        "rms norm": rms_norm,
        "gelu bias": gelu_bias,
        "swiglu": swiglu,
        "cross entropy 32k": lambda: cross_entropy(32768, 16384),
        "cross entropy 128k": lambda: cross_entropy(131072, 4096),
        "rotary": rotary,
        "adamw": adamw,
        "embedding": embedding,
        "batch norm relu": batch_norm,
        "sum of all": lambda: reduction((32768, 8192), None),
        "rows": lambda: reduction((32768, 8192), -1),
        "columns": lambda: reduction((262144, 1024), 0),
        "few columns": lambda: reduction((4194304, 64), 0),
        "long rows": lambda: reduction((64, 4194304), -1),
        "transpose f32": lambda: transpose(F32),
        "transpose bf16": lambda: transpose(BF16),
        "cumsum": cumsum,
    }


def training_call(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], list[Tensor]]:
    """A call forward and, if an input wants a gradient, backward: its results and gradients."""
    wanting = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    kept: list[Tensor] = []

    def call() -> list[Tensor]:
        results = function(*inputs)
        results = list(results) if isinstance(results, tuple) else [results]
        if not wanting:
            return results
        if not kept:
            kept.append(torch.randn_like(results[0]))
        return [results[0], *torch.autograd.grad(results[0], wanting, kept[0])]

    return call


def microseconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call when several are queued."""
    for _ in range(3):
        call()
    found = []
    for _ in range(ROUNDS):
        if device == "cpu":
            began = time.perf_counter()
            call()
            found.append((time.perf_counter() - began) * 1e6)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(found)


def copy_bytes_per_us(m: Maker) -> float:
    x = torch.randn(m.n(2**28), device=m.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / microseconds(lambda: y.copy_(x), m.device)


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative distance in norm over the results."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        gap = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        worst = max(worst, float(gap) if math.isfinite(float(gap)) else math.inf)
    return worst


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    torch.manual_seed(seed)
    yield


def measure(name: str, make: Callable[[], Case], m: Maker, chosen: Sequence[str], copy: float) -> dict[str, Any]:
    """One case with every backend."""
    row: dict[str, Any] = {"case": name}
    outputs: dict[str, list[Tensor]] = {}
    for which in chosen:
        torch.compiler.reset()
        dcompile.reset_counters()
        gc.collect()
        with seeded():
            case = make()
        function = case.function
        try:
            if which == "inductor":
                function = torch.compile(function, dynamic=False)
            elif which != "eager":
                options = Options.from_env({"autotune": which == "tuned"})
                function = torch.compile(function, backend=backend(options), dynamic=False)
            call = training_call(function, case.inputs)
            began = time.perf_counter()
            with seeded(1):
                outputs[which] = [t.detach().clone() for t in call()]
            row[f"{which}_compile_s"] = time.perf_counter() - began
            row[which] = microseconds(call, m.device)
            row[f"{which}_share"] = case.nbytes / row[which] / copy
        except Exception:
            row[f"{which}_error"] = traceback.format_exc(limit=-4)
        if which in ("dcompile", "tuned"):
            counted = dcompile.counters()
            row["kernels"], row["fallbacks"] = counted.kernel_launches, dict(counted.fallbacks)
    ours = [which for which in ("dcompile", "tuned") if which in outputs]
    if "eager" in outputs and ours:
        row["distance"] = max(distance(outputs[which], outputs["eager"]) for which in ours)
        row["wrong"] = not row["distance"] < 2e-2
    return row


def text_of(row: dict[str, Any]) -> str:
    def cell(which: str) -> str:
        if which in row:
            return f"{row[which]:>10.1f} {100 * row[f'{which}_share']:>4.0f}%"
        return f"{'FAILED' if which + '_error' in row else '-':>16}"

    ratios = " ".join(f"{ratio(row, which):>7.2f}" for which in ("dcompile", "tuned"))
    mark = "  WRONG" if row.get("wrong") else ""
    cells = " ".join(cell(which) for which in BACKENDS)
    rest = f"{row.get('kernels', 0):>4} {row.get('distance', math.nan):>9.1e}{mark} {row.get('fallbacks') or ''}"
    return f"{row['case']:<20}{cells} {ratios} {rest}"


def ratio(row: dict[str, Any], which: str) -> float:
    """How many times Inductor's speed."""
    return row["inductor"] / row[which] if "inductor" in row and which in row else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda", help="cpu tries the script out")
    parser.add_argument("--scale", type=int, default=1, help="divides sizes, to try the script out")
    given = parser.parse_args()
    m = Maker(given.device, given.scale)
    where = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    copy = copy_bytes_per_us(m)
    print(
        f"torch {torch.__version__} on {where}; copy {copy / 1e6:.2f} TB/s. Microseconds and share of that bandwidth."
    )
    print(f"{'case':<20}" + " ".join(f"{which:>16}" for which in BACKENDS) + "  ratios launches, distance from eager")
    rows = []
    for name, make in cases(m).items():
        if given.only and name not in given.only:
            continue
        rows.append(measure(name, make, m, given.backends, copy))
        print(text_of(rows[-1]), flush=True)
        for which in BACKENDS:
            if f"{which}_error" in rows[-1]:
                print(f"--- {which}\n{rows[-1][f'{which}_error']}")
    means = {}
    for which in ("dcompile", "tuned"):
        ratios = [found for r in rows if (found := ratio(r, which)) == found]
        means[which] = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
        print(f"geometric mean of inductor / {which}: {means[which]:.3f} over {len(ratios)}")
    given.results.mkdir(parents=True, exist_ok=True)
    facts = {"date": datetime.date.today().isoformat(), "device": where, "torch": torch.__version__, "copy": copy}
    path = given.results / f"{facts['date']}-gpu_kernels.json"
    path.write_text(json.dumps({**facts, "command": sys.argv, "means": means, "rows": rows}, indent=1))
    return int(any(row.get("wrong") or "dcompile_error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
