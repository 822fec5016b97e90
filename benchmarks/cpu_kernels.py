"""Printed C++ kernels against eager PyTorch and against torch.compile's default backend, one thread.

    python benchmarks/cpu_kernels.py [--threads N]

Every contender runs on the same tensors in turns; the best of several rounds counts. ``GB/s`` counts each input and
output once, so that it can be compared with the copy in the first line. On one thread its processor time is measured,
which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sympy
import torch

from dcompile.codegen.cpp import print_cpp
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Role, Write
from dcompile.ir.nodes import Ref
from dcompile.ir.types import DType, Value, contiguous_stride
from dcompile.runtime.toolchain import compile_shared, load_functions

P, S, V = Role.PARALLEL, Role.SERIAL, Role.SIMD
I0, I1, R0 = symbol("i0"), symbol("i1"), symbol("r0")
F32, I64 = DType.F32, DType.I64
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"}
"""glibc keeps freed memory, so that no figure holds the page faults of a fresh result (2 us for each 4 KiB here)."""

ROUNDS = 9
SECONDS_A_ROUND = 0.05


@dataclass(frozen=True)
class Case:
    """One kernel, the eager function it stands for, and its inputs."""

    name: str
    eager: Callable[..., object]
    inputs: dict[str, torch.Tensor]
    kernel: Kernel


def _value(name: str, *shape: int) -> Value:
    return Value(name, F32, shape, contiguous_stride(shape))


def _number(x: float) -> ex.Expr:
    return ex.const(x, F32)


def softmax(rows: int, columns: int) -> Case:
    at = I0 * columns + R0
    x = ex.load("x", (at,), F32)
    shifted = ex.op("exp", ex.op("sub", x, ex.local("top", F32)))
    body = (
        Fold(((R0, columns),), (V,), (Accumulator("top", "max", x),)),
        Fold(((R0, columns),), (V,), (Accumulator("sum", "sum", ex.local("e", F32)),), (Let("e", shifted),),
             (Write("y", at, ex.local("e", F32)),)),
        Let("scale", ex.op("reciprocal", ex.local("sum", F32))),
        Nest(((R0, columns),), (V,), (Write("y", at, ex.op("mul", ex.load("y", (at,), F32), ex.local("scale", F32))),)),
    )  # fmt: skip
    kernel = Kernel(outs=(_value("y", rows, columns),), body=(Nest(((I0, rows),), (P,), body),))
    return Case(f"softmax {rows}x{columns}", lambda x: torch.softmax(x, -1), {"x": torch.randn(rows, columns)}, kernel)


def layer_norm(rows: int, columns: int) -> Case:
    at = I0 * columns + R0
    x = ex.load("x", (at,), F32)
    away = ex.op("sub", x, ex.local("mean", F32))
    scaled = ex.op("mul", ex.op("mul", away, ex.local("rstd", F32)), ex.load("w", (R0,), F32))
    body = (
        Fold(((R0, columns),), (V,), (Accumulator("sum", "sum", x),)),
        Let("mean", ex.op("mul", ex.local("sum", F32), _number(1 / columns))),
        Fold(((R0, columns),), (V,), (Accumulator("square", "sum", ex.op("mul", away, away)),)),
        Let("var", ex.op("mul", ex.local("square", F32), _number(1 / columns))),
        Let("rstd", ex.op("rsqrt", ex.op("add", ex.local("var", F32), _number(1e-5)))),
        Nest(((R0, columns),), (V,), (Write("y", at, ex.op("add", scaled, ex.load("b", (R0,), F32))),)),
    )
    kernel = Kernel(outs=(_value("y", rows, columns),), body=(Nest(((I0, rows),), (P,), body),))
    inputs = {"x": torch.randn(rows, columns), "w": torch.randn(columns), "b": torch.randn(columns)}
    return Case(
        f"layer_norm {rows}x{columns}",
        lambda x, w, b: torch.nn.functional.layer_norm(x, (columns,), w, b),
        inputs,
        kernel,
    )


def gelu(n: int) -> Case:
    x = ex.load("x", (I0,), F32)
    erf = ex.op("erf", ex.op("mul", x, _number(0.7071067811865476)))
    y = ex.op("mul", ex.op("mul", x, _number(0.5)), ex.op("add", erf, _number(1.0)))
    kernel = Kernel(outs=(_value("y", n),), body=(Nest(((I0, n),), (V,), (Write("y", I0, y),)),))
    return Case(f"gelu {n}", torch.nn.functional.gelu, {"x": torch.randn(n)}, kernel)


def pointwise(n: int) -> Case:
    a, b, c = (ex.load(name, (I0,), F32) for name in "abc")
    y = ex.op("add", ex.op("mul", ex.op("sigmoid", a), b), ex.op("tanh", ex.op("maximum", c, _number(0.0))))
    kernel = Kernel(outs=(_value("y", n),), body=(Nest(((I0, n),), (V,), (Write("y", I0, y),)),))
    inputs = {name: torch.randn(n) for name in "abc"}
    return Case(f"sigmoid(a)*b+tanh(relu(c)) {n}", lambda a, b, c: a.sigmoid() * b + c.relu().tanh(), inputs, kernel)


def column_sum(rows: int, columns: int) -> Case:
    x = ex.load("x", (R0 * columns + I0,), F32)
    fold = Fold(((R0, rows),), (S,), (Accumulator("sum", "sum", x),))
    body = (Nest(((I0, columns),), (V,), (fold, Write("y", I0, ex.local("sum", F32)))),)
    kernel = Kernel(outs=(_value("y", columns),), body=body)
    return Case(f"column sum {rows}x{columns}", lambda x: x.sum(0), {"x": torch.randn(rows, columns)}, kernel)


def cross_entropy(rows: int, columns: int) -> Case:
    x = ex.load("x", (I0 * columns + R0,), F32)
    label = ex.op("wrap_index", ex.load("t", (I0,), I64), ex.const(columns, I64))
    chosen = ex.load("x", (I0 * columns + ex.bound(0),), F32, (label,))
    exponential = ex.op("exp", ex.op("sub", x, ex.local("top", F32)))
    lse = ex.op("add", ex.op("log", ex.local("sum", F32)), ex.local("top", F32))
    body = (
        Fold(((R0, columns),), (V,), (Accumulator("top", "max", x),)),
        Fold(((R0, columns),), (V,), (Accumulator("sum", "sum", exponential),)),
        Write("y", I0, ex.op("sub", lse, chosen)),
    )
    kernel = Kernel(outs=(_value("y", rows),), body=(Nest(((I0, rows),), (P,), body),))
    inputs = {"x": torch.randn(rows, columns), "t": torch.randint(0, columns, (rows,))}
    return Case(
        f"cross_entropy {rows}x{columns}",
        lambda x, t: torch.nn.functional.cross_entropy(x, t, reduction="none"),
        inputs,
        kernel,
    )


def printed(case: Case, threads: int) -> Callable[..., torch.Tensor]:
    """The case's kernel as a function that allocates its result."""
    specs = []
    for name, x in case.inputs.items():
        specs.append(Value(name, DType.of(x.dtype) or F32, tuple(x.shape), contiguous_stride(tuple(x.shape))))
    out = case.kernel.outs[0]
    module = print_cpp(Graph("inference", tuple(specs), (case.kernel,), (Ref(out.name),)).check())
    path = Path(tempfile.mkdtemp()) / "kernels.so"
    compile_shared(module.source, path)
    call = module.calls[0]
    function = load_functions(path, module.signatures)[call.function]
    shape = tuple(int(sympy.sympify(n)) for n in out.shape)
    names = list(case.inputs)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        y = torch.empty(shape)
        tensors = dict(zip(names, inputs, strict=True)) | {out.name: y}
        function(*(tensors[name].data_ptr() for name in call.buffers), threads)
        return y

    return run


def best_seconds(contenders: list[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    """Fastest mean time of one call over ``ROUNDS`` rounds, the contenders taking turns."""
    best = [float("inf")] * len(contenders)
    for contender in contenders:
        contender()
    for _ in range(ROUNDS):
        for n, contender in enumerate(contenders):
            calls, start = 0, clock()
            while (spent := clock() - start) < SECONDS_A_ROUND:
                contender()
                calls += 1
            best[n] = min(best[n], spent / calls)
    return best


def main() -> None:
    if any(name not in os.environ for name in KEEP_MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_MEMORY, **os.environ})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    (copy_s,) = best_seconds([lambda: target.copy_(source)], clock)
    print(f"{'copy of 64 MiB':44s} {source.nbytes * 2 / copy_s * 1e-9:7.1f} GB/s")
    print(f"{'kernel':44s} {'eager us':>10s} {'peer us':>10s} {'ours us':>10s} {'GB/s':>7s} {'error':>9s}")
    cases = [softmax(4096, 1024), softmax(256, 50257), layer_norm(4096, 768)]
    cases += [gelu(2**22), pointwise(2**22), gelu(2**14)]
    cases += [column_sum(4096, 768), column_sum(512, 50257), cross_entropy(1024, 50257)]
    for case in cases:
        inputs = list(case.inputs.values())
        ours, peer = printed(case, threads), torch.compile(case.eager, dynamic=False)
        got, want = ours(*inputs), case.eager(*inputs)
        error = (got - want).abs().max().item()
        times = best_seconds([partial(f, *inputs) for f in (case.eager, peer, ours)], clock)
        moved = sum(x.nbytes for x in inputs) + got.nbytes
        eager_us, peer_us, ours_us = (t * 1e6 for t in times)
        figures = f"{eager_us:10.1f} {peer_us:10.1f} {ours_us:10.1f} {moved / ours_us * 1e-3:7.1f} {error:9.1e}"
        print(f"{case.name:44s} {figures}")


if __name__ == "__main__":
    main()
