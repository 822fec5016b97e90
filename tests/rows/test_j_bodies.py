"""Rows J: loop bodies, index arithmetic, order and merging of loops."""

from __future__ import annotations

import time

import pytest
import sympy
import torch
from torch import Tensor

from dcompile.codegen.triton import print_triton
from dcompile.ir import expr as ex
from dcompile.ir.index import FloorDiv, Mod, simplify, symbol, upper_bound
from dcompile.ir.kernel import Fold, Kernel, Nest, expressions, statements
from dcompile.ir.nodes import Pointwise
from dcompile.ir.text import parse_expr, print_expr
from dcompile.ir.types import DType
from dcompile.reference import run_reference
from dcompile.reference.evaluate import Evaluator, Frame
from dcompile.schedule.fuse import fuse
from tests.rows.check import Seen, chk
from tests.rows.test_c_reductions import context, graph_of

F32 = DType.F32
I0, I1 = symbol("i0"), symbol("i1")


def the_kernel(seen: Seen) -> Kernel:
    (kernel,) = (node for node in seen.plan.graph.nodes if isinstance(node, Kernel))
    return kernel


def extents_of(kernel: Kernel) -> list[list[object]]:
    return [[size for _, size in s.axes] for s in statements(kernel.body) if isinstance(s, Nest | Fold)]


@pytest.mark.row("J1")
def test_bodies_are_expressions_that_print_parse_and_move() -> None:
    x = ex.load("x", (I0, I1), F32)
    double = ex.op("add", x, x)
    assert len(ex.loads(double)) == 1
    body = ex.op("mul", ex.op("exp", double), ex.to(ex.index(I0 * 3 + I1), F32))
    text = print_expr(body)
    assert text == "exp(x[i0, i1] + x[i0, i1]) * to_f32(index(3*i0 + i1))"
    assert parse_expr(text, {"x": F32}) is body
    swapped = ex.substitute(body, {I0: I1, I1: I0})
    y = ex.load("x", (I1, I0), F32)
    assert swapped is ex.op("mul", ex.op("exp", ex.op("add", y, y)), ex.to(ex.index(I1 * 3 + I0), F32))


@pytest.mark.row("J2")
def test_masked_parts_are_blocks() -> None:
    f = torch.nn.functional

    def program(x: Tensor) -> Tensor:
        return f.pad(f.pad(x, (1, 2)) * 2, (2, 0))

    seen = chk(program, torch.randn(4, 5))
    assert (seen.K, seen.X) == (1, 0)
    kernel = the_kernel(seen)
    masks = [e for root in expressions(kernel.body) for e in ex.walk(root) if isinstance(e, ex.Masked)]
    assert masks
    once = the_kernel(chk(lambda x: f.pad(x, (1, 2)), torch.randn(4, 5)))
    (body,) = {root for root in expressions(once.body) if not isinstance(root, ex.Local)}
    assert isinstance(body, ex.Masked)
    assert "masked(" in print_expr(body)
    assert parse_expr(print_expr(body), dict.fromkeys(once.operands, F32)) is body
    several = chk(lambda x: torch.bucketize(x, torch.tensor([0.0, 0.5, 1.0])) + torch.frexp(x)[1], torch.randn(9))
    assert several.result.dtype is torch.int64


@pytest.mark.row("J3")
def test_positions_that_depend_on_data() -> None:
    x, i, j = torch.randn(9, 4), torch.tensor([0, -1, 3, -9]), torch.tensor([1, 1, -2])
    seen = chk(lambda x, i, j: x[i][j] + x[i, :][j], x, i, j)
    assert (seen.K, seen.X) == (1, 0)
    for wrong in (9, -10):
        compiled = torch.compile(lambda x, i: x[i], backend="dcompile")
        with pytest.raises(IndexError):
            compiled(x, torch.tensor([0, wrong]))


@pytest.mark.row("J4")
def test_loops_are_merged_and_reordered() -> None:
    flat = the_kernel(chk(lambda x: x.relu(), torch.randn(8, 16, 32)))
    assert extents_of(flat) == [[8 * 16 * 32]]
    image = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    assert extents_of(the_kernel(chk(lambda x: x.relu() + 1, image))) == [[2 * 3 * 5 * 7]]
    sliced = the_kernel(chk(lambda x: x[..., 1:] * 2, image))
    (nest,) = (s for s in statements(sliced.body) if isinstance(s, Nest))
    assert [size for _, size in nest.axes] == [2 * 5, 6 * 3]  # rows and images, then pixels with their channels
    mixed = chk(lambda x, y: x + y, image, image.contiguous())
    assert mixed.K == 1
    assert len(extents_of(the_kernel(mixed))[0]) > 1


@pytest.mark.row("J5")
def test_loops_run_in_the_order_of_memory() -> None:
    x, y = torch.randn(30, 20), torch.randn(20, 30)
    for program in (lambda x, y: x.t() + y, lambda x, y: (x.t() + y).t(), lambda x, y: (x + y.t()) * x):
        kernel = the_kernel(chk(program, x, y))
        (nest,) = (s for s in statements(kernel.body) if isinstance(s, Nest))
        inner = nest.axes[-1][0]
        steps = [load.index[0].coeff(inner) for root in expressions(kernel.body) for load in ex.loads(root)]
        assert steps.count(1) >= len(steps) / 2
    odd = chk(lambda x: x.t().reshape(50, 12).flip(0) + 1, x)
    assert odd.K == 1


@pytest.mark.row("J6")
def test_neighbours_keep_the_order_of_a_library_result() -> None:
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)

    def program(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, w).relu() + y

    other = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    seen = chk(program, image, weight, other, rtol=1e-4, atol=1e-4)
    assert (seen.K, seen.X) == (1, 1)
    (nest,) = (s for s in statements(the_kernel(seen).body) if isinstance(s, Nest))
    assert [size for _, size in nest.axes] == [2 * 4 * 6 * 6]


@pytest.mark.row("J7")
def test_a_flat_loop_and_a_reduction_of_rows_fuse() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x.reshape(-1) * 2).tanh()
        return y, y.reshape(40, 50).sum(1)

    seen = chk(program, torch.randn(40, 50))
    assert (seen.K, seen.X) == (1, 0)


@pytest.mark.row("J8")
def test_bounds_choose_the_width_of_positions() -> None:
    i, j = symbol("i"), symbol("j")
    ranges = {i: 2**16, j: 2**16}
    assert upper_bound(i * 2**16 + j, ranges) == 2**32 - 1
    assert upper_bound(FloorDiv(i, sympy.Integer(3)), ranges) == 2**16 // 3
    assert simplify(Mod(i, sympy.Integer(2**16)), ranges) == i  # a remainder that the bounds make unnecessary

    def text(rows: int) -> str:
        line = f"y: f32[{rows}, 65536]@cuda = pointwise (i0: {rows}, i1: 65536) x[i0, i1] + 1.0:f32"
        source = print_triton(fuse(graph_of(line, f"x: f32[{rows}, 65536]@cuda"), context())).source
        return source[source.index("def g0") :]

    assert "int64" not in text(2**14)
    assert "int64" in text(2**16)
    count = 70_000
    seen = chk(lambda x: torch.arange(count)[x] * 50_000, torch.tensor([0, count - 1]))
    assert seen.result.tolist() == [0, (count - 1) * 50_000]


@pytest.mark.row("J9")
def test_bodies_are_interpreted_without_a_module() -> None:
    body = parse_expr("let c0 = exp(x[i0]) in c0 / (c0 + 1.0:f32)", {"x": F32})
    x = torch.randn(5)
    frame = Frame({}, {"x": x}).inside(((I0, 5),))
    torch.testing.assert_close(Evaluator(frame).full(body), torch.sigmoid(x))
    begin = time.perf_counter()
    for _ in range(2000):
        Evaluator(frame)(body)
    assert time.perf_counter() - begin < 5
    names: list[str] = []

    def handler(node: ex.Expr) -> ex.Expr | None:
        names.append(f"{type(node).__name__}:{node.dtype.value}")
        return None

    assert ex.transform(body, handler) is body
    assert names == ["Load:f32", "Op:f32", "Const:f32", "Op:f32", "Op:f32"]
    graph = graph_of("y: f32[5] = pointwise (i0: 5) exp(x[i0])", "x: f32[5]")
    assert isinstance(graph.nodes[0], Pointwise)
    (got,) = run_reference([graph], [[x]])[0]
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, x.exp())
