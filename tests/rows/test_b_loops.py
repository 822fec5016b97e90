"""Rows B: loops before and after fusion."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dcompile.codegen.triton import print_triton
from dcompile.ir import expr as ex
from dcompile.ir.kernel import Kernel, Nest, Role, Write, expressions, statements
from dcompile.ir.nodes import Pointwise
from dcompile.ir.types import DType
from dcompile.schedule.fuse import fuse
from dcompile.schedule.inline import MAX_OPS, inline_pointwise
from tests.rows.check import Seen, chk
from tests.rows.test_c_reductions import context, graph_of

F32 = DType.F32


def the_kernel(seen: Seen) -> Kernel:
    (kernel,) = (node for node in seen.plan.graph.nodes if isinstance(node, Kernel))
    return kernel


def modes(seen: Seen) -> set[str]:
    kernels = [node for node in seen.plan.graph.nodes if isinstance(node, Kernel)]
    return {s.mode for kernel in kernels for s in statements(kernel.body) if isinstance(s, Write)}


@pytest.mark.row("B1")
def test_a_chain_is_one_loop() -> None:
    seen = chk(lambda x, y: ((x * 2 + y).relu() - 1).tanh() / 3, torch.randn(40, 30), torch.randn(40, 30))
    kernel = the_kernel(seen)
    assert (seen.K, seen.X) == (1, 0)
    (nest,) = kernel.body
    assert isinstance(nest, Nest)
    assert sum(isinstance(s, Write) for s in statements(kernel.body)) == 1
    ops = [e.name for root in expressions(kernel.body) for e in ex.walk(root) if isinstance(e, ex.Op)]
    assert ops.count("tanh") == 1


@pytest.mark.row("B2")
def test_dimensions_of_size_1_have_no_variable() -> None:
    kernel = the_kernel(chk(lambda x: x + 1, torch.randn(1, 5, 1)))
    for root in expressions(kernel.body):
        for load in ex.loads(root):
            assert len(load.index[0].free_symbols) == 1
    (nest,) = kernel.body
    assert isinstance(nest, Nest)
    assert [size for _, size in nest.axes] == [5]


@pytest.mark.row("B3")
def test_shared_operations_cost_once() -> None:
    x = ex.load("x", (0,), F32)
    y = ex.op("add", x, ex.const(1.0, F32))
    assert ex.flops(ex.op("mul", ex.op("mul", y, y), y)) == 3
    body = x
    for n in range(MAX_OPS // 2):
        body = ex.op("add", ex.op("mul", body, body), ex.const(float(n), F32))
    assert ex.flops(body) == 2 * (MAX_OPS // 2)


@pytest.mark.row("B4")
def test_reads_include_positions() -> None:
    graph = graph_of(
        "y: f32[4, 3] = pointwise (i0: 4, i1: 3) x[i0, q0 | q0 = wrap_index(idx[i1], 9:i64)] + z[i0, i1]",
        "x: f32[4, 9], idx: i64[3], z: f32[4, 3]",
    )
    (node,) = graph.nodes
    assert isinstance(node, Pointwise)
    assert set(node.operands) == {"x", "idx", "z"}
    (kernel,) = fuse(graph, context()).nodes
    assert set(kernel.operands) == {"x", "idx", "z"}
    seen = chk(lambda x, i, z: x[:, i] + z, torch.randn(4, 9), torch.tensor([0, -1, 5]), torch.randn(4, 3))
    assert (seen.K, seen.X) == (1, 0)


@pytest.mark.row("B6")
def test_stores_at_positions_that_depend_on_data() -> None:
    def add(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
        return x.scatter_add(0, i, v)

    places = torch.tensor([1, 3, 1, 1, 0, 3])
    seen = chk(add, torch.randn(5), places, torch.randn(6))
    assert seen.X == 0
    assert seen.K <= 2
    assert "add" in modes(seen)
    put = chk(lambda x, i, v: x.index_put((i,), v), torch.randn(5), torch.tensor([2, 0]), torch.randn(2))
    assert modes(put) == {"set"}
    on_gpu = graph_of(
        "y: f32[5]@cuda = store add x (i0: 6) [q0 | q0 = wrap_index(i[i0], 5:i64)] = v[i0]",
        "x: f32[5]@cuda, i: i64[6]@cuda, v: f32[6]@cuda",
    )
    assert "atomic_add" in print_triton(fuse(on_gpu, context())).source
    plain = graph_of(
        "y: f32[5]@cuda = store set x (i0: 6) [q0 | q0 = wrap_index(i[i0], 5:i64)] = v[i0]",
        "x: f32[5]@cuda, i: i64[6]@cuda, v: f32[6]@cuda",
    )
    text = print_triton(fuse(plain, context())).source
    assert "atomic_add" not in text[text.index("def g0") :]


@pytest.mark.row("B7")
def test_transposed_operands_are_read_in_tiles() -> None:
    x = torch.randn(256, 256)
    seen = chk(lambda x: x + x.t(), x)
    (nest,) = the_kernel(seen).body
    assert isinstance(nest, Nest)
    assert len(nest.axes) == 4
    assert nest.roles[-1] is Role.SIMD
    assert nest.roles[-2] is Role.SERIAL
    batched = chk(lambda x: (x * 2 + x.transpose(1, 2)).relu(), torch.randn(3, 128, 128))
    assert batched.K == 1
    odd = chk(lambda x: x + x.t(), torch.randn(250, 250))
    (nest,) = the_kernel(odd).body
    assert isinstance(nest, Nest)
    assert len(nest.axes) == 2  # no tile divides it
    rows = chk(lambda x, y: x + y[:, None], x, x[0])
    (nest,) = the_kernel(rows).body
    assert isinstance(nest, Nest)
    assert len(nest.axes) == 2  # nothing runs across


@pytest.mark.row("I7")
def test_several_readers_recompute_what_is_cheap() -> None:
    def kept(text: str) -> list[str]:
        graph = graph_of(text, "a: f32[1000], b: f32[1000], c: f32[1000], d: f32[1000], e: f32[1000]", "y")
        return [node.out.name for node in inline_pointwise(graph, context()).nodes if isinstance(node, Pointwise)]

    many = "a[i0] + b[i0] + c[i0] + d[i0] + e[i0]"
    readers = """
    u: f32[500, 2] = pointwise (i0: 500, i1: 2) t[2*i0 + i1] * 2.0:f32
    v: f32[2, 500] = pointwise (i0: 2, i1: 500) t[500*i0 + i1] - 1.0:f32
    y: f32[1000] = pointwise (i0: 1000) u[i0 // 2, i0 % 2] + v[i0 // 500, i0 % 500] + t[i0]
    """
    assert "t" in kept(f"t: f32[1000] = pointwise (i0: 1000) {many}" + readers)
    assert "t" not in kept("t: f32[1000] = pointwise (i0: 1000) a[i0] + 1.0:f32" + readers)
    wide = "y: f32[90, 1000] = pointwise (i0: 90, i1: 1000) t[i1] * to_f32(index(i0))"
    assert "t" in kept("t: f32[1000] = pointwise (i0: 1000) exp(a[i0])\n" + wide)
    both = chk(lambda x: (x.exp() * 2, x.exp() + 1), torch.randn(300))
    assert both.K == 1
    assert sum("dc::exp_(" in line for line in both.code.splitlines()) == 1


@pytest.mark.row("I6")
def test_values_that_need_memory_anyway_are_read_from_it() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        h = x.sin() * x  # the matrix product needs it in memory
        return h @ w + h.sum(1, keepdim=True)

    seen = chk(program, torch.randn(30, 20), torch.randn(20, 8), rtol=1e-4, atol=1e-4)
    assert seen.X == 1
    assert sum("sin_(" in line for line in seen.code.splitlines()) == 1


@pytest.mark.row("I8")
def test_expressions_do_not_grow_without_bound() -> None:
    def chain(x: Tensor, n: int) -> Tensor:
        for k in range(n):
            x = x * 1.01 + k
        return x

    seen = chk(lambda x: chain(x, 300), torch.randn(50), rtol=1e-3, atol=1e-2)
    assert seen.K == 1
    for kernel in (node for node in seen.plan.graph.nodes if isinstance(node, Kernel)):
        for root in expressions(kernel.body):
            assert sum(isinstance(e, ex.Op) for e in ex.walk(root)) <= MAX_OPS
    passes = {n: seconds(n) for n in (100, 400)}
    assert passes[400] < 16 * passes[100]


def seconds(length: int) -> float:
    """How long passes take over a chain of ``length`` loops."""
    lines = [f"t{n + 1}: f32[50] = pointwise (i0: 50) tanh(t{n}[i0]) + 1.0:f32" for n in range(length)]
    graph = graph_of("\n".join(lines), "t0: f32[50]", f"t{length}")
    begin = time.perf_counter()
    fuse(inline_pointwise(graph, context()), context())
    return time.perf_counter() - begin
