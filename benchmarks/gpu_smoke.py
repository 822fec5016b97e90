"""One GPU: fused kernels against eager PyTorch, then short trainings of the example's GPT with every backend.

    PYTHONPATH=. python benchmarks/gpu_smoke.py [--steps N]

Needs torch, Triton and one CUDA device; dcompile need not be installed. Step times are medians over the last half of
the steps, the GPU synchronised around each step.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "examples")]
os.environ.setdefault("DCOMPILE_CACHE_DIR", tempfile.mkdtemp(prefix="dcompile-gpu-"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcompile
from dcompile.backend import backend
from dcompile.options import Options

Forms = dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], float]]

PRECISION = {"tiny": torch.float32, "small": torch.float32, "small bf16": torch.bfloat16}


def forms() -> Forms:
    """Functions that compile to every kernel form, their inputs, and the tolerance of their results."""
    a, b = torch.randn(1023, 777, device="cuda"), torch.randn(1023, 777, device="cuda")
    big, half = torch.randn(4096, 4096, device="cuda"), torch.randn(512, 1024, device="cuda").bfloat16()
    ids = torch.randint(0, 1000, (8192,), device="cuda")
    table = torch.randn(1000, 64, device="cuda")
    weight = torch.randn(1024, device="cuda")
    return {
        "pointwise": (lambda x, y: torch.tanh(x * y + 2).exp().clamp(0.1, 2).sqrt(), (a, b), 1e-5),
        "transposed": (lambda x, y: x.t() * 2 + y.t().contiguous(), (a, b), 1e-6),
        "softmax": (lambda x: torch.softmax(x, -1), (a,), 1e-5),
        "long rows": (lambda x: torch.softmax(x, -1), (torch.randn(16, 50257, device="cuda"),), 1e-5),
        "short rows": (lambda x: x / x.sum(-1, keepdim=True), (torch.rand(100000, 12, device="cuda") + 0.1,), 1e-5),
        "layer norm bf16": (lambda x, w: F.layer_norm(x.float(), (1024,), w).bfloat16(), (half, weight), 2e-2),
        "columns": (lambda x: (x.sum(0), x.amax(0)), (big,), 1e-3),
        "few columns": (lambda x: x.sum(0), (torch.randn(65536, 24, device="cuda"),), 2e-3),
        "full sum": (lambda x: x.square().mean(), (big,), 1e-4),
        "argmax": (lambda x: x.argmax(-1), (a,), 0.0),
        "variance": (lambda x: torch.var(x, -1), (big,), 1e-5),
        "embedding": (lambda t, i: F.embedding(i, t) * 2, (table, ids), 1e-6),
        "index add": (lambda t, i, x: t.index_add(0, i, x), (table, ids, torch.randn(8192, 64, device="cuda")), 1e-3),
        "pad and cat": (lambda x, y: F.pad(torch.cat([x, y], 1), (3, 5)), (a, b), 0.0),
        "cross entropy": (lambda x, i: F.cross_entropy(x, i), (torch.randn(8192, 1000, device="cuda"), ids), 1e-4),
        "integers": (lambda i: (i // 7 + i % 5) * 3 - (i >> 2), (ids,), 0.0),
    }


def microseconds(function: Callable[[], Any], rounds: int = 30) -> float:
    """GPU time of one call, best of a few, launches included."""
    best = float("inf")
    for _ in range(3):
        function()
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1000)
    return best


def check_forms() -> int:
    """Prints a line a form; returns how many are wrong."""
    wrong = 0
    print(f"{'form':<18}{'result':<10}{'kernels':>8}{'dcompile us':>13}{'eager us':>11}")
    for name, (function, inputs, tolerance) in forms().items():
        torch.compiler.reset()
        dcompile.reset_counters()
        try:
            compiled = torch.compile(function, backend=backend(Options.from_env()), dynamic=False)
            found, expected = compiled(*inputs), function(*inputs)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
            counted = dcompile.counters()
            mine, theirs = (
                microseconds(lambda c=compiled, i=inputs: c(*i)),
                microseconds(lambda f=function, i=inputs: f(*i)),
            )
            fallbacks = dict(counted.fallbacks) or ""
            print(f"{name:<18}{'equal':<10}{counted.kernel_launches:>8}{mine:>13.1f}{theirs:>11.1f}  {fallbacks}")
        except Exception:
            wrong += 1
            print(f"{name:<18}FAILED\n{traceback.format_exc(limit=-6)}")
    return wrong


def train(
    model: nn.Module, compiled: nn.Module, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[list[float], float, float]:
    """Losses, seconds of the first step, and the median step in milliseconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses, seconds = [], []
    for batch in batches:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = compiled(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return [float(x) for x in losses], seconds[0], statistics.median(seconds[len(seconds) // 2 :]) * 1000


def compare_trainings(steps: int) -> int:
    """Prints a table of losses and step times; returns how many trainings are wrong."""
    import train_gpt as example

    text, wrong = example.standard_library(), 0
    heads = f"{'first loss':>11}{'last loss':>11}{'compile s':>11}{'step ms':>9}  kernels, library calls"
    print(f"\n{'model':<12}{'backend':<10}{heads}")
    for preset, dtype in PRECISION.items():
        shape = example.PRESETS[preset.split()[0]]
        torch.manual_seed(0)
        original = example.GPT(shape).cuda()
        batches = [
            tuple(t.cuda() for t in example.batch_of(text, 8, shape.context, seed=0, rank=0, step=step))
            for step in range(steps)
        ]
        reference: list[float] = []
        for name in ("eager", "dcompile", "inductor"):
            torch.compiler.reset()
            dcompile.reset_counters()
            model = copy.deepcopy(original)
            chosen: Any = {"dcompile": backend(Options.from_env()), "inductor": "inductor"}.get(name)
            try:
                compiled = model if chosen is None else torch.compile(model, backend=chosen)
                losses, first_s, step_ms = train(model, compiled, batches, dtype)
            except Exception:
                wrong += name == "dcompile"
                print(f"{preset:<12}{name:<10}FAILED\n{traceback.format_exc(limit=-8)}")
                continue
            reference = reference or losses
            gap = max(abs(x - y) for x, y in zip(losses, reference, strict=True))
            bad = gap > (0.05 if dtype is torch.float32 else 0.2)
            wrong += bad and name == "dcompile"
            counted = dcompile.counters()
            note = (
                f"{counted.kernel_launches}, {counted.library_calls} {dict(counted.fallbacks) or ''}"
                if name == "dcompile"
                else ""
            )
            print(
                f"{preset:<12}{name:<10}{losses[0]:>11.4f}{losses[-1]:>11.4f}{first_s:>11.1f}{step_ms:>9.2f}  {note}"
                f"  max gap {gap:.1e}{'  WRONG' if bad else ''}",
                flush=True,
            )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    return min(check_forms() + compare_trainings(given.steps), 1)


if __name__ == "__main__":
    sys.exit(main())
