"""Scans in tiles and matrix products with epilogues on one GPU: eager PyTorch, Inductor and dcompile in one process.

    PYTHONPATH=.:launch python benchmarks/gpu_templates.py [--seconds 170] [--results FOLDER]

Scans are checked against eager's (integers exactly, a hundred times) and timed beside the least traffic, one read and
one write. Of products the verdict is kept: what the library's call and the elementwise kernel take, and what the one
kernel takes. Cases that no time is left for are named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "benchmarks")]
os.environ.setdefault("DCOMPILE_CACHE_DIR", tempfile.mkdtemp(prefix="dcompile-gpu-"))

import torch
import torch.nn.functional as F
from gpu_kernels import Maker, copy_bytes_per_us, distance, microseconds
from torch import Tensor

from dcompile.backend import backend
from dcompile.options import Options
from dcompile.pipeline import Built

F32, BF16 = torch.float32, torch.bfloat16
REPEATS = 100

Function = Callable[..., Any]
Made = tuple[Function, tuple[Tensor, ...]]


def scans() -> dict[str, Callable[[], Made]]:
    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, device="cuda")

    return {
        "cumsum f32 2^22": lambda: (lambda x: x.cumsum(0), (floats(1 << 22),)),
        "cumsum f32 2^26": lambda: (lambda x: x.cumsum(0), (floats(1 << 26),)),
        "cumsum i64 2^24": lambda: (lambda x: x.cumsum(0), (torch.randint(-9, 9, (1 << 24,), device="cuda"),)),
        "cumsum f32 8 x 2^21": lambda: (lambda x: x.cumsum(1), (floats(8, 1 << 21),)),
        "cumsum f64 2^22": lambda: (lambda x: x.cumsum(0), (floats(1 << 22).double(),)),
        "cummax f32 2^22": lambda: (lambda x: x.cummax(0), (floats(1 << 22),)),
        "cumsum f32 2^18 x 32, columns": lambda: (lambda x: x.cumsum(0), (floats(1 << 18, 32),)),
        "logcumsumexp f32 2^22": lambda: (lambda x: x.logcumsumexp(0), (floats(1 << 22),)),
    }


def products() -> dict[str, Callable[[], Made]]:
    def r(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype) * shape[-1] ** -0.5

    gelu = lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh")  # noqa: E731
    return {
        "4096x768x3072 bias gelu": lambda: (gelu, (r(4096, 768), r(3072, 768), r(3072))),
        "4096x3072x768 bias residual": lambda: (
            lambda x, w, b, h: F.linear(x, w, b) + h,
            (r(4096, 3072), r(768, 3072), r(768), r(4096, 768, dtype=F32)),
        ),
        "4096x2048x5632 silu gate": lambda: (
            lambda x, w, g: F.silu(F.linear(x, w)) * g,
            (r(4096, 2048), r(5632, 2048), r(4096, 5632)),
        ),
        "4096x5632x2048 residual": lambda: (
            lambda x, w, h: F.linear(x, w) + h,
            (r(4096, 5632), r(2048, 5632), r(4096, 2048)),
        ),
        "4096x768x768 bias residual": lambda: (
            lambda x, w, b, h: F.linear(x, w, b) + h,
            (r(4096, 768), r(768, 768), r(768), r(4096, 768, dtype=F32)),
        ),
        "64 x 512x64x512 scaled": lambda: (
            lambda q, k: torch.bmm(q, k.transpose(1, 2)) * 0.125,
            (r(64, 512, 64), r(64, 512, 64)),
        ),
    }


def run_case(name: str, make: Callable[[], Made], peers: tuple[str, ...], copy: float) -> dict[str, Any]:
    torch.manual_seed(0)
    function, inputs = make()
    row: dict[str, Any] = {"case": name}
    want = _tensors(function(*inputs))
    built: list[Built] = []
    for which in peers:
        torch.compiler.reset()
        try:
            call = function
            if which == "max-autotune":
                call = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
            elif which == "inductor":
                call = torch.compile(function, dynamic=False)
            elif which in ("dcompile", "tuned"):
                options = Options.from_env({"autotune": which == "tuned"})
                call = torch.compile(function, backend=backend(options, built.append), dynamic=False)
            began = time.perf_counter()
            found = _tensors(call(*inputs))
            torch.cuda.synchronize()
            row[f"{which}_compile_s"] = round(time.perf_counter() - began, 2)
            row[which] = round(microseconds(lambda call=call: call(*inputs), "cuda"), 2)
            if which in ("dcompile", "tuned"):
                row[f"{which}_distance"] = distance(found, want)
        except Exception:
            row[f"{which}_error"] = traceback.format_exc(limit=-3)
    nbytes = sum(t.nbytes for t in (*inputs, *want))
    row["least_us"] = round(nbytes / copy, 2)
    plans = [b.plan for b in built if b.plan is not None]
    row["verdicts"] = [f"{v.decision}: {v.reason}" for p in plans for v in p.verdicts if v.stage == "products"]
    return row


def races() -> dict[str, Any]:
    """Wrong results among many runs of scans of integers, rows of which end in different tiles."""
    wrong: dict[str, Any] = {}
    for shape, dim in (((1 << 22,), 0), ((3, 700_001), 1), ((50_003, 24), 0)):
        x = torch.randint(-9, 9, shape, device="cuda")
        want = x.cumsum(dim)
        torch.compiler.reset()
        call = torch.compile(lambda x, dim=dim: x.cumsum(dim), backend=backend(Options.from_env({})), dynamic=False)
        wrong[str(shape)] = sum(not torch.equal(call(x), want) for _ in range(REPEATS))
    return wrong


def _tensors(result: Any) -> list[Tensor]:
    return [t.detach().clone() for t in (result if isinstance(result, tuple) else (result,))]


def text_of(row: dict[str, Any]) -> str:
    times = " ".join(
        f"{which} {row[which]:.1f}" if which in row else f"{which} FAILED"
        for which in ("eager", "inductor", "dcompile", "tuned", "max-autotune")
        if which in row or f"{which}_error" in row
    )
    far = max((row[k] for k in row if k.endswith("_distance")), default=0.0)
    return f"{row['case']:<32} {times} least {row['least_us']:.1f} distance {far:.1e} {'; '.join(row['verdicts'])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    copy = copy_bytes_per_us(Maker("cuda", 1))
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "copy_bytes_per_us": copy, "wrong_of_100": races(), "rows": [],
    }  # fmt: skip
    print(report["device"], report["torch"], f"copy {copy / 1e6:.2f} TB/s", report["wrong_of_100"], flush=True)
    work = [(n, m, ("eager", "inductor", "dcompile")) for n, m in scans().items()]
    work += [(n, m, ("eager", "inductor", "dcompile", "tuned")) for n, m in products().items()]
    work += [(n, m, ("max-autotune",)) for n, m in list(products().items())[:3]]
    left: list[str] = []
    for name, make, peers in work:
        if time.perf_counter() - began > arguments.seconds - 12:
            left.append(name)
            continue
        row = run_case(name, make, peers, copy)
        report["rows"].append(row)
        print(text_of(row), flush=True)
        for key in row:
            if key.endswith("_error"):
                print(key, str(row[key])[-700:], flush=True)
        if arguments.results is not None:
            path = arguments.results / f"{report['date']}-gpu_templates.json"
            path.write_text(json.dumps({**report, "left_out": left}, indent=1) + "\n")
    print(f"{time.perf_counter() - began:.0f} s", "left out: " + ", ".join(left) if left else "", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
