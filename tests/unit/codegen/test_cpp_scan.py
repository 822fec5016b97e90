"""Scans and mean-and-variance accumulators as C++ against the reference and against double precision."""

from __future__ import annotations

import pytest
import sympy
import torch

from dcompile.ir import expr as ex
from dcompile.ir.combine import neutral, rule
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Nest, Role, ScanLoop, Write
from dcompile.ir.types import DType
from dcompile.reference import run_reference
from tests.unit.codegen.kernels import kernel_graph, run, value

F32, F64, I64 = DType.F32, DType.F64, DType.I64
P0, R0, R1 = symbol("p0"), symbol("r0"), symbol("r1")


def scanned(kind: str, rows: int, columns: int, lanes: bool, dtype: DType = F32) -> Kernel:
    """Running folds along the rows of x, or down its columns side by side."""
    outer, inner = (columns, rows) if lanes else (rows, columns)
    address = R0 * columns + P0 if lanes else P0 * columns + R0
    entering = (ex.load("x", (address,), dtype), *((ex.index(R0),) if kind.startswith("cum") else ()))
    names = tuple(f"s{k}" for k in range(len(entering)))
    outs = tuple(value(f"y{k}", (rows, columns), e.dtype) for k, e in enumerate(entering))
    writes = tuple(
        Write(out.name, address, ex.local(n, e.dtype)) for out, n, e in zip(outs, names, entering, strict=True)
    )
    loop = ScanLoop((R0, inner), names, entering, rule(kind, dtype), neutral(kind, dtype), (), writes)
    nest = Nest(((P0, outer),), (Role.SIMD if lanes else Role.PARALLEL,), (loop,))
    return Kernel(outs=outs, body=(nest,), targets=(None,) * len(outs))


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("kind", ["sum", "prod", "max", "min", "logaddexp", "cummax", "cummin"])
def test_scans_agree_with_the_reference(kind: str, lanes: bool) -> None:
    rows, columns = (60, 300) if lanes else (50, 61)
    graph = kernel_graph([value("x", (rows, columns))], scanned(kind, rows, columns, lanes))
    x = torch.randint(-4, 5, (rows, columns)) * 0.25 + 0.125
    x[3, 4] = float("nan") if kind != "logaddexp" else float("-inf")
    want = run_reference([graph], [[x.clone()]])[0]
    for threads in (1, 2):
        got, codes = run(graph, [x], threads=threads)
        assert codes == [0]
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5, equal_nan=True)


def test_a_rule_without_neutral_element_starts_from_the_first() -> None:
    left, right = ex.local("left0", I64), ex.local("right0", I64)
    first = (ex.op("add", ex.op("mul", left, ex.const(3, I64)), right),)
    entering = ex.load("x", (R0,), I64)
    loop = ScanLoop((R0, 9), ("s",), (entering,), first, (), (), (Write("y", R0, ex.local("s", I64)),))
    graph = kernel_graph([value("x", (9,), I64)], Kernel(outs=(value("y", (9,), I64),), body=(loop,)))
    x = torch.randint(-9, 9, (9,))
    running, want = int(x[0]), [int(x[0])]
    for item in x[1:].tolist():
        running = running * 3 + item
        want.append(running)
    (got,), _ = run(graph, [x])
    (reference,) = run_reference([graph], [[x]])[0]
    assert got.tolist() == want == reference.tolist()


def moments(shape: tuple[int, int], lanes: bool, threads: bool = False) -> Kernel:
    """Mean, squared distances and weight of every row, of every column, or of everything."""
    rows, columns = shape
    x = ex.load("x", (R0 * columns + P0 if lanes else P0 * columns + R0,), F32)
    names = ("mean", "squares", "n")
    writes = tuple(Write(f"y{k}", P0, ex.local(n, F32)) for k, n in enumerate(names))
    if threads:
        x = ex.load("x", (R1 * columns + R0,), F32)
        fold = Fold(
            ((R1, rows), (R0, columns)), (Role.PARALLEL, Role.SIMD), (Accumulator("mean", "welford", x, names[1:]),)
        )
        writes = tuple(Write(f"y{k}", sympy.Integer(0), ex.local(n, F32)) for k, n in enumerate(names))
        return Kernel(outs=tuple(value(f"y{k}", ()) for k in range(3)), body=(fold, *writes))
    fold = Fold(
        ((R0, rows if lanes else columns),),
        (Role.SERIAL if lanes else Role.SIMD,),
        (Accumulator("mean", "welford", x, names[1:]), Accumulator("top", "max", x)),
    )
    outer = columns if lanes else rows
    role = Role.SIMD if lanes else Role.PARALLEL
    body = Nest(((P0, outer),), (role,), (fold, *writes, Write("y3", P0, ex.local("top", F32))))
    return Kernel(outs=tuple(value(f"y{k}", (outer,)) for k in range(4)), body=(body,))


@pytest.mark.parametrize(
    ("shape", "lanes"), [((40, 1), False), ((9, 9000), False), ((3, 100), True), ((300, 130), True)]
)
def test_moments_are_accurate_far_from_zero(shape: tuple[int, int], lanes: bool) -> None:
    x = torch.randn(shape) + 1e4
    x[0] += 1e3  # the first element of each column is far from the others
    x[:, 0] -= 1e3
    graph = kernel_graph([value("x", shape)], moments(shape, lanes))
    (mean, squares, n, top), _ = run(graph, [x], threads=2)
    dim, count = (0, shape[0]) if lanes else (1, shape[1])
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean(dim).float(), rtol=1e-6, atol=0)
    exact = ((wide - wide.mean(dim, keepdim=True)) ** 2).sum(dim).float()
    torch.testing.assert_close(squares, exact, rtol=2e-5, atol=0)
    assert n.tolist() == [count] * len(n)
    assert torch.equal(top, x.amax(dim))
    reference = run_reference([graph], [[x]])[0]
    torch.testing.assert_close(reference[1], exact, rtol=1e-5, atol=0)


def test_moments_over_threads_are_merged() -> None:
    x = torch.randn(200, 4096) * 3 - 70
    graph = kernel_graph([value("x", (200, 4096))], moments((200, 4096), lanes=False, threads=True))
    (mean, squares, n), _ = run(graph, [x], threads=2)
    (alone, _, _), _ = run(graph, [x], threads=1)
    torch.testing.assert_close(mean, x.double().mean().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares, (x.double().var() * (x.numel() - 1)).float(), rtol=1e-5, atol=0)
    assert (float(n), torch.equal(mean, alone)) == (x.numel(), True)


@pytest.mark.parametrize("lanes", [False, True])
def test_parts_without_weight_change_nothing(lanes: bool) -> None:
    means = torch.tensor([[5.0, 9.0, 2.0, float("nan")], [0.0, 1.0, 3.0, 4.0], [float("inf"), 1.0, 1.0, 7.0]])
    squares, weights = (
        torch.rand(3, 4),
        torch.tensor([[0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]),
    )
    if lanes:
        means, squares, weights = (t.t().contiguous() for t in (means, squares, weights))
    address = R0 * 3 + P0 if lanes else P0 * 4 + R0
    part = tuple(ex.load(name, (address,), F32) for name in ("m", "s", "w"))
    fold = Fold(((R0, 4),), (Role.SERIAL,), (Accumulator("a", "welford_merge", part[0], ("b", "c"), part[1:]),))
    writes = tuple(Write(f"y{k}", P0, ex.local(n, F32)) for k, n in enumerate("abc"))
    nest = Nest(((P0, 3),), (Role.SIMD if lanes else Role.SERIAL,), (fold, *writes))
    kernel = Kernel(outs=tuple(value(f"y{k}", (3,)) for k in range(3)), body=(nest,))
    shape = tuple(means.shape)
    graph = kernel_graph([value("m", shape), value("s", shape), value("w", shape)], kernel)
    got, _ = run(graph, [means, squares, weights])
    want = run_reference([graph], [[means, squares, weights]])[0]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert got[2].tolist() == [5.0, 0.0, 2.0]
    assert float(got[0][0]) == pytest.approx(4.8)
