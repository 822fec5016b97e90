"""Loop structure of printed kernels against the reference interpreter and eager PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch

from dcompile.codegen.cpp import prelude, print_cpp
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import FloorDiv, Mod, symbol
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Scratch, Write
from dcompile.ir.types import DType, Value
from dcompile.reference import run_reference
from tests.unit.codegen.kernels import (
    BF16,
    BOOL,
    F32,
    F64,
    I0,
    I1,
    I2,
    I64,
    R0,
    R1,
    P,
    S,
    V,
    column_sum,
    kernel_graph,
    pointwise,
    run,
    softmax,
    value,
)  # fmt: skip

GOLDEN = Path(__file__).parents[2] / "golden"


Inputs = list[torch.Tensor | int]


def agrees(graph: Graph, inputs: Inputs, rtol: float = 2e-6, atol: float = 1e-6) -> list[torch.Tensor]:
    """One and two threads give the reference's numbers, and the same as each other."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    want = run_reference([graph], [copies])[0]
    got, codes = run(graph, inputs, threads=1)
    again, more = run(graph, inputs, threads=2)
    assert codes == more == [0] * len(codes)
    for a, b, c in zip(got, again, want, strict=True):
        assert isinstance(c, torch.Tensor)
        torch.testing.assert_close(a, c, rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(b, a, rtol=rtol, atol=atol, equal_nan=True)
    return got


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (40, 1000)])
def test_softmax(rows: int, columns: int, dtype: DType) -> None:
    x = torch.randn(rows, columns).to(dtype.torch)
    x[0, 0] = float("-inf") if columns > 1 else 1.0
    if rows > 1:
        x[1, 3] = float("nan")
    graph = kernel_graph([value("x", (rows, columns), dtype)], softmax(rows, columns, dtype))
    (y,) = agrees(graph, [x], rtol=2e-6 if dtype is F32 else 1e-2)
    torch.testing.assert_close(y, x.softmax(-1), rtol=2e-6 if dtype is F32 else 1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 64), (300, 100), (700, 129)])
def test_column_sum(rows: int, columns: int) -> None:
    graph = kernel_graph([value("x", (rows, columns))], column_sum(rows, columns))
    agrees(graph, [torch.randn(rows, columns)], rtol=1e-5, atol=1e-5)


def test_dynamic_sizes() -> None:
    rows, columns = symbol("s3"), symbol("s1")
    inputs = [value("x", (rows, columns)), SizeInput(columns, 50), SizeInput(rows, 7)]
    graph = kernel_graph(inputs, softmax(rows, columns))
    x = torch.randn(9, 333)
    agrees(graph, [x, 333, 9])
    (y,), codes = run(graph, [torch.empty(0, 333), 333, 0])
    assert y.numel() == 0
    assert codes == [0]


def full_fold(kind: str, expr: ex.Expr, n: int, role: object, outer: int = 1) -> Kernel:
    """A fold of everything into one number; the first axis may be spread over threads."""
    axes = ((R0, outer), (R1, n)) if outer > 1 else ((R1, n),)
    roles = (role, V) if outer > 1 else (role,)
    dtype = I64 if kind.startswith("arg") else expr.dtype
    fold = Fold(axes, roles, (Accumulator("m", kind, expr),))
    return Kernel(outs=(value("y", (), dtype),), body=(fold, Write("y", sympy.Integer(0), ex.local("m", dtype))))


@pytest.mark.parametrize("kind", ["sum", "max", "min", "argmax", "argmin", "prod"])
@pytest.mark.parametrize("dtype", [F32, F64, I64])
@pytest.mark.parametrize("role", [S, V, P])
def test_fold_kinds(kind: str, dtype: DType, role: object) -> None:
    n, outer = (300, 1) if kind == "prod" else (1100, 40)
    x = torch.rand(outer, n) * 0.1 + 0.95 if dtype.is_float else torch.randint(-9, 9, (outer, n))
    expr = ex.load("x", (R0 * n + R1 if outer > 1 else R1,), dtype)
    graph = kernel_graph([value("x", (outer, n), dtype)], full_fold(kind, expr, n, role, outer))
    x = x.to(dtype.torch)
    agrees(graph, [x], rtol=1e-5)
    if dtype.is_float and kind != "sum":
        x[outer // 2, 77] = float("nan")
        x[-1, 99] = float("nan")
        agrees(graph, [x], rtol=1e-5)


def test_sum_is_as_accurate_as_eager() -> None:
    n = 3_000_000
    x = torch.rand(n)
    graph = kernel_graph([value("x", (n,))], full_fold("sum", ex.load("x", (R1,), F32), n, V))
    (y,), _ = run(graph, [x])
    exact = x.double().sum()
    assert abs(y.double() - exact) <= max(abs(x.sum().double() - exact), exact * 1e-7)


def test_column_sum_is_as_accurate_as_eager() -> None:
    x = torch.rand(20_000, 70)
    (y,), _ = run(kernel_graph([value("x", (20_000, 70))], column_sum(20_000, 70)), [x])
    exact = x.double().sum(0)
    assert (y - exact).abs().mean() <= 1.5 * (x.sum(0) - exact).abs().mean()


def test_strip_with_every_statement() -> None:
    """Lets before and after a fold, arg positions, scratch a lane, a serial nest, two accumulators."""
    rows, columns = 6, 150
    x = ex.load("x", (R0 * columns + I1,), F32)
    body = (
        Scratch("keep", F32, rows),
        Let("bias", ex.load("b", (I1,), F32)),
        Fold(
            ((R0, rows),), (S,),
            (Accumulator("total", "sum", ex.local("shifted", F32)), Accumulator("where", "argmax", x),
             Accumulator("top", "max", x)),
            lets=(Let("shifted", ex.op("add", x, ex.local("bias", F32))),),
            writes=(Write("keep", R0, ex.local("shifted", F32)),),
        ),
        Let("mean", ex.op("mul", ex.local("total", F32), ex.const(1 / rows, F32))),
        Write("place", I1, ex.local("where", I64)),
        Nest(((R1, rows),), (S,), (
            Write("y", R1 * columns + I1, ex.op("sub", ex.load("keep", (R1,), F32), ex.local("mean", F32))),)),
        Write("most", I1, ex.op("maximum", ex.local("top", F32), ex.local("mean", F32))),
    )  # fmt: skip
    outs = (value("place", (columns,), I64), value("y", (rows, columns)), value("most", (columns,)))
    kernel = Kernel(outs=outs, body=(Nest(((I1, columns),), (V,), body),))
    graph = kernel_graph([value("x", (rows, columns)), value("b", (columns,))], kernel)
    place, y, most = agrees(graph, [x_ := torch.randn(rows, columns), b := torch.randn(columns)])
    assert torch.equal(place, x_.argmax(0))
    torch.testing.assert_close(y, x_ + b - (x_ + b).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(most, torch.maximum(x_.amax(0), (x_ + b).mean(0)))


def test_nest_of_all_roles_and_a_fold_that_writes() -> None:
    a, b, c = 3, 4, 37
    address = (I0 * b + I1) * c + R0
    x = ex.load("x", (address,), F32)
    square = Accumulator("n", "sum", ex.op("mul", x, x))
    fold = Fold(((R0, c),), (V,), (square,), writes=(Write("y", address, ex.op("exp", x)),))
    body = (fold, Write("norm", I0 * b + I1, ex.op("sqrt", ex.local("n", F32))))
    nest = Nest(((I0, a), (I1, b)), (P, S), body)
    kernel = Kernel(outs=(value("y", (a, b, c)), value("norm", (a, b))), body=(nest,))
    agrees(kernel_graph([value("x", (a, b, c))], kernel), [torch.randn(a, b, c)])


def test_collapsed_parallel_loops() -> None:
    a, b, c = 12, 30, 129
    here, there = (I0 * b + I1) * c + I2, (I1 * a + I0) * c + I2
    scale = ex.op("exp", ex.load("w", (I0,), F32))
    write = Write("y", here, ex.op("mul", ex.load("x", (there,), F32), scale))
    kernel = Kernel(outs=(value("y", (a, b, c)),), body=(Nest(((I0, a), (I1, b), (I2, c)), (P, P, V), (write,)),))
    graph = kernel_graph([value("x", (b, a, c)), value("w", (a,))], kernel)
    assert "collapse(2)" in print_cpp(graph).source
    (y,) = agrees(graph, [x := torch.randn(b, a, c), w := torch.randn(a)])
    torch.testing.assert_close(y, x.transpose(0, 1) * w.exp()[:, None, None])


def test_masked_load_stays_inside() -> None:
    n = 100
    shifted = ex.load("x", (I0 - 40,), F32)
    inside = ex.op("ge", ex.index(I0), ex.const(40, I64))
    first = ex.op("lt", ex.index(I0), ex.const(3, I64))
    other = ex.masked(first, ex.load("z", (I0,), F32), ex.const(-1.0, F32))
    kernel = pointwise((n,), ex.masked(inside, ex.op("exp", shifted), other))
    agrees(kernel_graph([value("x", (60,)), value("z", (3,))], kernel), [torch.randn(60), torch.randn(3)])


def test_division_in_addresses() -> None:
    n = 120
    moved = Mod(I0, sympy.Integer(10)) * 12 + FloorDiv(I0, sympy.Integer(10))
    below = FloorDiv(I0 - 50, sympy.Integer(7))
    expr = ex.op("add", ex.load("x", (moved,), F32), ex.index(below, F32))
    agrees(kernel_graph([value("x", (n,))], pointwise((n,), expr)), [torch.randn(n)])


def embedding(count: int, width: int, rows: int) -> Graph:
    position = ex.op("wrap_index", ex.load("ids", (I0,), I64), ex.const(rows, I64))
    read = ex.load("table", (ex.bound(0) * width + I1,), F32, (position,))
    body = (Write("y", I0 * width + I1, read),)
    kernel = Kernel(outs=(value("y", (count, width)),), body=(Nest(((I0, count), (I1, width)), (P, V), body),))
    return kernel_graph([value("ids", (count,), I64), value("table", (rows, width))], kernel)


def test_embedding_and_its_errors() -> None:
    table, ids = torch.randn(11, 33), torch.randint(-11, 11, (2000,))
    (y,) = agrees(embedding(2000, 33, 11), [ids, table])
    assert torch.equal(y, table[ids])
    for bad in (11, -12, 2**62):
        ids[1500] = bad
        for threads in (1, 2):
            assert run(embedding(2000, 33, 11), [ids, table], threads)[1] == [1]
    assert run(embedding(2000, 33, 0), [ids, torch.empty(0, 33)])[1] == [1]


@pytest.mark.parametrize("dtype", [F32, BF16, I64])
def test_scatter_add_with_repeats(dtype: DType) -> None:
    count, width, rows = 3000, 20, 7
    position = ex.op("wrap_index", ex.load("ids", (I0,), I64), ex.const(rows, I64))
    write = Write("y", ex.bound(0) * width + I1, ex.load("x", (I0 * width + I1,), dtype), (position,), mode="add")
    nest = Nest(((I0, count), (I1, width)), (P, V), (write,))
    kernel = Kernel(outs=(value("y", (rows, width), dtype),), targets=("z",), body=(nest,))
    specs = [value("z", (rows, width), dtype), value("ids", (count,), I64), value("x", (count, width), dtype)]
    x = torch.randint(-3, 4, (count, width)).to(dtype.torch)
    graph = kernel_graph(specs, kernel)
    z, ids = torch.randint(-3, 4, (rows, width)).to(dtype.torch), torch.randint(-rows, rows, (count,))
    agrees(graph, [z, ids, x], rtol=0.2 if dtype is BF16 else 1e-6, atol=8.0 if dtype is BF16 else 1e-6)


def test_add_of_one_address_from_many_lanes() -> None:
    n = 50_000
    write = Write("y", sympy.Integer(0), ex.load("x", (I0,), I64), mode="add")
    kernel = Kernel(outs=(value("y", (1,), I64),), targets=("z",), body=(Nest(((I0, n),), (V,), (write,)),))
    graph = kernel_graph([value("z", (1,), I64), value("x", (n,), I64)], kernel)
    agrees(graph, [torch.ones(1).long(), torch.randint(-9, 9, (n,))])


@pytest.mark.parametrize("name", ["floordiv", "truncdiv", "mod", "fmod"])
def test_integer_division_by_zero_is_reported(name: str) -> None:
    a, b = torch.randint(-50, 50, (100,)), torch.randint(1, 9, (100,))
    graph = kernel_graph(
        [value("a", (100,), I64), value("b", (100,), I64)],
        pointwise((100,), ex.op(name, ex.load("a", (I0,), I64), ex.load("b", (I0,), I64))),
    )
    agrees(graph, [a, b])
    b[63] = 0
    assert run(graph, [a, b])[1] == [2]
    a[5], b[5], b[63] = -(2**63), -1, 1
    assert run(graph, [a, b])[1] == [0]


def test_top_level_scratch_and_two_nests() -> None:
    n = 70
    x = ex.load("x", (I0,), F32)
    body = (
        Scratch("m", F32, n),
        Nest(((I0, n),), (V,), (Write("m", I0, ex.op("exp", x)),)),
        Nest(((I1, n),), (V,), (Write("y", I1, ex.load("m", (n - 1 - I1,), F32)),)),
    )
    agrees(kernel_graph([value("x", (n,))], Kernel(outs=(value("y", (n,)),), body=body)), [torch.randn(n)])


def test_read_back_of_a_written_value() -> None:
    n = 64
    body = (
        Write("y", I0, ex.op("add", ex.load("x", (I0,), F32), ex.const(1.0, F32))),
        Write("z", I0, ex.op("mul", ex.load("y", (I0,), F32), ex.load("y", (I0,), F32))),
        Write("y", I0, ex.load("z", (I0,), F32)),
        Write("w", I0, ex.load("y", (I0,), F32)),
    )
    kernel = Kernel(outs=tuple(value(name, (n,)) for name in "yzw"), body=(Nest(((I0, n),), (V,), body),))
    x = torch.randn(n)
    *_, w = agrees(kernel_graph([value("x", (n,))], kernel), [x])
    torch.testing.assert_close(w, (x + 1) ** 2)


def test_bool_folds_and_stores() -> None:
    n = 500
    positive = ex.op("gt", ex.load("x", (I0 * n + R0,), F32), ex.const(3.0, F32))
    body = (Fold(((R0, n),), (V,), (Accumulator("m", "any", positive),)), Write("y", I0, ex.local("m", BOOL)))
    kernel = Kernel(outs=(value("y", (8,), BOOL),), body=(Nest(((I0, 8),), (P,), body),))
    (y,) = agrees(kernel_graph([value("x", (8, n))], kernel), [torch.randn(8, n)])
    assert y.any()
    assert not y.all()


def test_empty_loops_touch_nothing() -> None:
    body = (Nest(((I0, 0),), (V,), (Write("y", I0, ex.load("x", (sympy.Integer(0),), F32)),)),)
    kernel = Kernel(outs=(value("y", (0,)),), body=body)
    assert run(kernel_graph([value("x", (0,))], kernel), [torch.empty(0)])[1] == [0]


def test_identical_kernels_are_printed_once() -> None:
    def exp_of(source: str, out: str, n: int) -> Kernel:
        return pointwise((n,), ex.op("exp", ex.load(source, (I0,), F32)), out)

    copy = pointwise((9,), ex.load("z", (I0,), F32), "w")
    graph = kernel_graph([value("x", (9,))], exp_of("x", "y", 9), exp_of("y", "z", 9), copy)
    module = print_cpp(graph)
    assert len(module.signatures) == 2
    assert module.calls[0].function == module.calls[1].function != module.calls[2].function
    assert module.calls[1].buffers == ("y", "z")
    (_, z, _) = agrees(graph, [x := torch.randn(9)])
    torch.testing.assert_close(z, x.exp().exp())


def test_unknown_names_are_a_compiler_bug() -> None:
    stray = pointwise((9,), ex.op("add", ex.load("x", (I0,), F32), ex.local("nobody", F32)))
    with pytest.raises(CompilerBug, match="nobody"):
        print_cpp(kernel_graph([value("x", (9,))], stray))


def test_complex_is_a_compiler_bug() -> None:
    kernel = pointwise((9,), ex.load("x", (I0,), DType.C64))
    with pytest.raises(CompilerBug, match="c64"):
        print_cpp(kernel_graph([Value("x", DType.C64, (9,), (1,))], kernel))


@pytest.mark.parametrize(
    ("name", "kernel", "shape"),
    [("softmax", softmax(128, 1000), (128, 1000)), ("column_sum", column_sum(4096, 1000), (4096, 1000))],
)
def test_golden_text(name: str, kernel: Kernel, shape: tuple[int, int]) -> None:
    text = print_cpp(kernel_graph([value("x", shape)], kernel)).source.removeprefix(prelude()).lstrip()
    assert text == (GOLDEN / f"{name}.cpp").read_text()


@pytest.mark.parametrize(("step", "atomic"), [(50, False), (49, True)])
def test_scatters_of_separate_rows_need_no_atomics(step: int, atomic: bool) -> None:
    place = ex.op("wrap_index", ex.load("ids", (I0 * 50 + I1,), I64), ex.const(50, I64))
    target = I0 * step + ex.bound(0)
    write = Write("y", target, ex.load("x", (I0 * 50 + I1,), F32), bind=(place,), mode="add")
    nest = Nest(((I0, 900), (I1, 50)), (P, S), (write,))
    kernel = Kernel(outs=(value("y", (45_000,)),), targets=("z",), body=(nest,))
    graph = kernel_graph([value("z", (45_000,)), value("ids", (900, 50), I64), value("x", (900, 50))], kernel)
    assert ("atomic_add_f32(&" in print_cpp(graph).source) == atomic
    agrees(graph, [torch.randn(45_000), torch.randint(-50, 50, (900, 50)), torch.randn(900, 50)])
