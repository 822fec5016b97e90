"""Kernels of every form the Triton printer prints, with random inputs: for interpreter, compiler and real GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import sympy
import torch

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, CostModel
from dcompile.codegen.triton import TritonModule, TritonSignature, print_triton
from dcompile.codegen.triton_launch import Launch
from dcompile.collectives.text import parse_graph
from dcompile.ir import expr as ex
from dcompile.ir.combine import neutral
from dcompile.ir.combine import rule as combine
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import Mod, as_expr, symbol
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Nest, ScanLoop, Write, statements
from dcompile.ir.nodes import Ref, Scan
from dcompile.ir.ops import OPS, SPECIAL_BINARY, SPECIAL_UNARY
from dcompile.ir.types import DType, Value
from dcompile.options import Options
from dcompile.schedule import scan as schedule_scan
from dcompile.schedule.batch import batch_kernels
from dcompile.schedule.fuse import fuse
from dcompile.schedule.products import find_site
from dcompile.schedule.stages import split_reductions
from tests.unit.codegen.kernels import (
    BF16,
    BOOL,
    F16,
    F32,
    F64,
    I0,
    I1,
    I64,
    R0,
    P,
    S,
    V,
    column_sum,
    kernel_graph,
    pointwise,
    softmax,
    value,
)  # fmt: skip
from tests.unit.schedule.passes import context

N = 257
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 0.5, -2.5, 3.5, 1e30]
FLOAT_ONLY = {"div", "pow", "reciprocal", "fma", "sqrt", "rsqrt"} | {n for n, row in OPS.items() if row.flops >= 12}
OTHER = {"to", "bitcast", "rand", "randn", "wrap_index", "where", *SPECIAL_UNARY, *SPECIAL_BINARY}
INT_ONLY = {"and", "or", "xor", "not", "shl", "shr"}
INTS = (I64, DType.I32, DType.I16, DType.I8, DType.U8)

Inputs = list[torch.Tensor | int]


@dataclass(frozen=True)
class Case:
    """A KERNELS graph of CUDA values and CPU inputs for it.

    Attributes:
        tolerance: relative and absolute, against the reference interpreter.
        launches: cuts to test instead of the default ones.
    """

    graph: Graph
    inputs: Inputs
    tolerance: float = 2e-6
    launches: Mapping[int, Launch] | None = None


def on_cuda(graph: Graph) -> Graph:
    """The same graph over CUDA values."""
    inputs = tuple(replace(v, device="cuda") if isinstance(v, Value) else v for v in graph.inputs)
    nodes = []
    for node in graph.nodes:
        assert isinstance(node, Kernel)
        nodes.append(replace(node, outs=tuple(replace(out, device="cuda") for out in node.outs)))
    return replace(graph, inputs=inputs, nodes=tuple(nodes)).check()


def numbers(dtype: DType, spread: float = 3.0) -> torch.Tensor:
    if dtype is BOOL:
        return torch.rand(N) > 0.5
    if dtype.is_int:
        return torch.randint(0 if dtype is DType.U8 else -50, 50, (N,)).to(dtype.torch)
    x = torch.randn(N, dtype=torch.float64) * spread
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype.torch)


def loads(dtype: DType, count: int) -> list[ex.Expr]:
    return [ex.load(name, (I0,), dtype) for name in ("a", "b", "c")[:count]]


def ops_case(dtype: DType, tolerance: float) -> Case:
    """All scalar ops on one dtype, a kernel each."""
    wrong = OTHER | (INT_ONLY if dtype.is_float else FLOAT_ONLY)
    names = [name for name in OPS if name not in wrong]
    if dtype is BOOL:
        names = ["and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum"]
    kernels = [pointwise((N,), ex.op(name, *loads(dtype, OPS[name].arity)), f"y_{name}") for name in names]
    b = numbers(dtype).roll(5)
    if dtype.is_int:
        b[b == 0] = 7
        b[:3] = 1
    elif dtype.is_float:
        b[(b != 0) & (b.abs() < 1e-30)] = 0.25
    graph = kernel_graph([value(name, (N,), dtype) for name in "abc"], *kernels)
    return Case(on_cuda(graph), [numbers(dtype), b, numbers(dtype).roll(11)], tolerance)


def conversions_case(source: DType) -> Case:
    x = ex.load("a", (I0,), source)
    targets = [t for t in (F32, F64, F16, BF16, *INTS, BOOL) if t is not source]
    data = numbers(source, 30.0)
    if source.is_float:
        data = data.nan_to_num(1.0, 2.0, -2.0).clamp(-120, 120)
        targets.remove(DType.U8)  # a negative float as unsigned byte has no defined value
    kernels = [pointwise((N,), ex.to(x, t), f"y_{t.value}") for t in targets]
    return Case(on_cuda(kernel_graph([value("a", (N,), source)], *kernels)), [data], 0.0)


def bits_case() -> Case:
    a, b, f = ex.load("a", (I0,), F32), ex.load("b", (I0,), F32), ex.load("f", (I0,), BOOL)
    kernels = (
        pointwise((N,), ex.op("where", f, a, b), "y_where"),
        pointwise((N,), ex.op("bitcast", a, dtype=DType.I32), "y_bits"),
        pointwise((N,), ex.op("add", a, ex.const(-0.0, F32)), "y_zero"),
    )
    inputs = [value("a", (N,)), value("b", (N,)), value("f", (N,), BOOL)]
    return Case(on_cuda(kernel_graph(inputs, *kernels)), [numbers(F32), numbers(F32), numbers(BOOL)], 0.0)


def random_case(name: str) -> Case:
    seed, offset = ex.load("seed", (0,), I64), ex.index(I0 * 2**33 + 5)
    kernel = pointwise((N,), ex.op(name, seed, offset, dtype=F32), "y")
    graph = on_cuda(kernel_graph([value("seed", (1,), I64)], kernel))
    return Case(graph, [torch.tensor([-(2**62) + 12345])], 0.0 if name == "rand" else 5e-5)


def softmax_case(rows: int, columns: int, dtype: DType, launch: Launch | None = None) -> Case:
    x = torch.randn(rows, columns).to(dtype.torch)
    if rows > 1:
        x[1, 3] = float("nan")
    graph = kernel_graph([value("x", (rows, columns), dtype)], softmax(rows, columns, dtype))
    return Case(on_cuda(graph), [x], 3e-6 if dtype is F32 else 1e-2, {0: launch} if launch else None)


def dynamic_case(launch: Launch | None = None) -> Case:
    rows, columns = symbol("s3"), symbol("s1")
    inputs = [value("x", (rows, columns)), SizeInput(columns, 50), SizeInput(rows, 7)]
    graph = on_cuda(kernel_graph(inputs, softmax(rows, columns)))
    return Case(graph, [torch.randn(9, 133), 133, 9], 3e-6, {0: launch} if launch else None)


def fold_case(kind: str, dtype: DType, launch: Launch | None = None) -> Case:
    """Rows folded into one number each, NaN and ties among them."""
    rows, columns = 3, 70
    if kind == "any":
        dtype, x = BOOL, torch.rand(rows, columns) > 0.97
        x[0] = False
    elif dtype.is_float:
        x = (torch.rand(rows, columns, dtype=torch.float64) * 0.1 + 0.95).to(dtype.torch)
        x[0, 9] = x[0, 33] = 5.0
        if kind != "sum" and kind != "prod":
            x[1, 60] = x[1, 44] = float("nan")
    else:
        x = torch.randint(-9, 9, (rows, columns)).to(dtype.torch)
    expr = ex.load("x", (I0 * columns + R0,), dtype)
    out = I64 if kind.startswith("arg") else dtype
    fold = Fold(((R0, columns),), (V,), (Accumulator("m", kind, expr),))
    body = (Nest(((I0, rows),), (P,), (fold, Write("y", I0, ex.local("m", out)))),)
    graph = kernel_graph([value("x", (rows, columns), dtype)], Kernel(outs=(value("y", (rows,), out),), body=body))
    return Case(on_cuda(graph), [x], 5e-2 if dtype.is_low_precision else 1e-5, {0: launch} if launch else None)


def fused_case(text: str, seed: int = 0, integers: int = 4, launch: Launch | None = None) -> Case:
    """A LOOPS graph as fusion writes it; integer inputs are below ``integers``."""
    graph = fuse(parse_graph(text).check(), context()).check()
    generator = torch.Generator().manual_seed(seed)
    inputs: Inputs = []
    for item in graph.inputs:
        assert isinstance(item, Value)
        shape = tuple(int(n) for n in item.shape)
        if item.dtype.is_float:
            inputs.append(torch.randn(shape, generator=generator).to(item.dtype.torch))
        else:
            inputs.append(torch.randint(0, integers, shape, generator=generator).to(item.dtype.torch))
    launches = dict.fromkeys(range(len(graph.nodes)), launch) if launch else None
    return Case(on_cuda(graph), inputs, 1e-5, launches)


def batched_case(text: str) -> Case:
    """A LOOPS graph on the GPU whose kernels have come together in batches."""
    graph = batch_kernels(fuse(parse_graph(text).check(), context()), context()).check()
    generator = torch.Generator().manual_seed(0)
    shapes = [(tuple(int(n) for n in v.shape), v.dtype.torch) for v in graph.inputs if isinstance(v, Value)]
    return Case(graph, [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes], 1e-2)


def scan_case(kind: str, dtype: DType, along: str = "i1", launch: Launch | None = None) -> Case:
    """A scan of rows or columns of (5, 37)."""
    values, rule = neutral(kind, dtype), combine(kind, dtype)
    axes = ((I0, 5), (I1, 37))
    x = ex.load("x", (I0, I1), dtype)
    variable = I1 if along == "i1" else I0
    exprs = (x,) if len(rule) == 1 else (x, ex.index(variable))
    outs = tuple(value(f"y{n}", (5, 37), e.dtype) for n, e in enumerate(exprs))
    scan = Scan(outs=outs, axes=axes, along=variable, exprs=exprs, combine=rule, start=values)
    graph = Graph("f", (value("x", (5, 37), dtype),), (scan,), tuple(Ref(out.name) for out in outs)).check()
    data = torch.rand(5, 37, dtype=torch.float64).add(0.5) if dtype.is_float else torch.randint(-3, 4, (5, 37))
    launches = {0: launch} if launch else None
    return Case(on_cuda(fuse(graph, context()).check()), [data.to(dtype.torch)], 1e-4, launches)


def split_scan_case(
    kind: str, dtype: DType, shape: tuple[int, int], along: str = "i1", length: int | None = 64
) -> Case:
    """A scan that is cut into tiles of ``length``, a few ragged; without a start if ``kind`` is "no start". With None
    tiles are as long as they really are."""
    started = kind != "no start"
    kind = kind if started else "sum"
    values, rule = neutral(kind, dtype.compute) if started else (), combine(kind, dtype.compute)
    axes, variable = ((I0, shape[0]), (I1, shape[1])), I1 if along == "i1" else I0
    x = ex.to(ex.load("x", (I0, I1), dtype), dtype.compute)
    exprs = (x,) if len(rule) == 1 else (x, ex.index(variable))
    dtypes = (dtype, I64)[: len(exprs)]
    outs = tuple(replace(value(f"y{n}", shape, d), device="cuda") for n, d in enumerate(dtypes))
    scan = Scan(outs=outs, axes=axes, along=variable, exprs=exprs, combine=rule, start=values)
    data = replace(value("x", shape, dtype), device="cuda")
    graph = Graph("f", (data,), (scan,), tuple(Ref(out.name) for out in outs)).check()
    given = torch.rand(shape, dtype=torch.float64).add(0.5) if dtype.is_float else torch.randint(-3, 4, shape)
    shorter = {} if length is None else {"TILE_ELEMENTS": length, "COLUMN_TILE": length, "WHOLE": 1}
    with patch.multiple(schedule_scan, **shorter) if shorter else nullcontext():
        cut = fuse(graph, gpu_context()).check()
    assert any(isinstance(s, ScanLoop) and s.tiles for node in cut.nodes for s in statements(node.body))
    return Case(cut, [given.to(dtype.torch)], 1e-4)


def product_case(text: str, launch: Launch | None = None, tf32: bool = False, tolerance: float = 1e-5) -> Case:
    """A library product and its reader in a LOOPS graph on the GPU, as the one kernel that does both."""
    graph = fuse(parse_graph(text).check(), gpu_context()).check()
    sites = (find_site(graph, n, tf32) for n in range(len(graph.nodes)))
    site = next(found for found in sites if found is not None)
    graph = site.rewrite(graph)
    (position,) = (n for n, node in enumerate(graph.nodes) if isinstance(node, Kernel))
    assert len(graph.nodes) == 1
    data: Inputs = []
    for given in graph.inputs:
        assert isinstance(given, Value)
        shape, stride = ([int(n) for n in sizes] for sizes in (given.shape, given.stride))
        data.append(torch.empty_strided(shape, stride, dtype=given.dtype.torch).copy_(torch.randn(shape)))
    return Case(graph, data, tolerance, {position: launch} if launch else None)


def linear(m: int, n: int, k: int, dtype: str, left: str = "", right: str = "") -> str:
    """The text of a linear layer with bias, GELU and a residual, whose pre-activation is kept; strides of operands."""
    operands = f"b: {dtype}[{n}]@cuda, x: {dtype}[{m}, {k}]{left}@cuda, w: {dtype}[{k}, {n}]{right}@cuda"
    return f"""
graph f({operands}, r: f32[{m}, {n}]@cuda) {{
  h: {dtype}[{m}, {n}]@cuda = extern aten.addmm.default(%b, %x, %w) -> aten.addmm.out
  y: {dtype}[{m}, {n}]@cuda = pointwise (i0: {m}, i1: {n}) to_{dtype}(tanh(to_f32(h[i0, i1])) + r[i0, i1])
  return %h, %y
}}"""


TRANSPOSED_LINEAR = linear(20, 36, 50, "f16", "{1, 20}", "{1, 50}")

BATCHED_PRODUCT = """
graph f(x: bf16[3, 24, 40]@cuda, w: bf16[3, 40, 20]{800, 1, 40}@cuda) {
  h: bf16[3, 24, 20]@cuda = extern aten.bmm.default(%x, %w) -> aten.bmm.out
  y: f32[24, 3, 20]@cuda = pointwise (i0: 24, i1: 3, i2: 20) to_f32(h[i1, i0, i2]) * 0.5:f32
  return %y
}"""
"""Transposed operands in batches, the result permuted, and not kept."""

SCALED_PRODUCT = """
graph f(c: f32[32, 1]@cuda, x: f32[32, 50]@cuda, w: f32[50, 48]@cuda) {
  h: f32[32, 48]@cuda = extern aten.addmm.default(%c, %x, %w, beta=0.5, alpha=2.0) -> aten.addmm.out
  y: f32[1536]@cuda = pointwise (i0: 1536) maximum(h[i0 // 48, i0 % 48], 0.0:f32)
  return %y
}"""

DOT = Launch(block=16, inner=16, persistent=False, num_warps=4, stages=2, step=16)
"""A cut for the interpreter, with ragged tiles on every side."""


def gpu_context() -> Context:
    return Context(Options.from_env({"cache_dir": None}), CostModel.analytical("cuda", 1))


COUNT = """
graph f(x: f32[5, 40]) {
  n: f32[5] = reduce sum (i0: 5; r0: 40) 1.0:f32
  m: f32[5] = reduce max (i0: 5; r0: 40) x[i0, r0] / x[i0, 0]
  return %n, %m
}"""
"""A fold of a constant; divisions by one number a row."""

BATCH = """
graph f(a: f32[700]@cuda, b: f32[5, 40]@cuda, c: f32[300]@cuda, d: f32[37, 20]@cuda, e: f32[700]@cuda) {
  p: bf16[700]@cuda = pointwise (i0: 700) to_bf16(a[i0])
  q: f32[5]@cuda = reduce sum (i0: 5; r0: 40) b[i0, r0]
  r: bf16[300]@cuda = pointwise (i0: 300) to_bf16(c[i0])
  s: f32[20]@cuda = reduce sum (i0: 20; r0: 37) d[r0, i0]
  t: bf16[700]@cuda = pointwise (i0: 700) to_bf16(e[i0])
  return %p, %q, %r, %s, %t
}"""
"""Flat members, two of them alike, rows and columns in one launch."""

LAYER_NORM = """
graph f(x: f32[5, 48], w: f32[48]) {
  s: f32[5] = reduce sum (i0: 5; r0: 48) x[i0, r0]
  d: f32[5, 48] = pointwise (i0: 5, i1: 48) tanh(x[i0, i1] - s[i0] / 48.0:f32)
  v: f32[5] = reduce sum (i0: 5; r0: 48) d[i0, r0] * d[i0, r0]
  o: f32[5, 48] = pointwise (i0: 5, i1: 48) d[i0, i1] / sqrt(v[i0] + 1.0:f32) * w[i1]
  return %o
}"""
"""Scratch between two passes over a row."""

STORED = LAYER_NORM.replace("return %o", "return %o, %d")
"""A row that is stored in one pass and read again in the next."""

NORM_GRADIENT = """
graph f(x: f32[96, 48]@cuda, dy: f32[96, 48]@cuda, w: f32[48]@cuda, mean: f32[96]@cuda, rstd: f32[96]@cuda) {
  h: f32[96, 48]@cuda = pointwise (i0: 96, i1: 48) (x[i0, i1] - mean[i0]) * rstd[i0]
  a: f32[96]@cuda = reduce sum (i0: 96; r0: 48) dy[i0, r0] * w[r0]
  b: f32[96]@cuda = reduce sum (i0: 96; r0: 48) dy[i0, r0] * w[r0] * h[i0, r0]
  g: f32[96, 48]@cuda = pointwise (i0: 96, i1: 48) dy[i0, i1] * w[i1] * 48.0:f32 - a[i0] - h[i0, i1] * b[i0]
  dx: f32[96, 48]@cuda = pointwise (i0: 96, i1: 48) g[i0, i1] * rstd[i0]
  dw: f32[48]@cuda = reduce sum (i0: 48; r0: 96) dy[r0, i0] * h[r0, i0]
  db: f32[48]@cuda = reduce sum (i0: 48; r0: 96) dy[r0, i0]
  top: f32[48]@cuda = reduce max (i0: 48; r0: 96) dx[r0, i0]
  return %dx, %dw, %db, %top
}"""
"""The backward of a layer norm: reductions of rows and of columns of the same elements."""

BIAS_GRADIENT = """
graph f(x: bf16[96, 56]@cuda, dy: bf16[96, 56]@cuda) {
  dx: f32[96, 56]@cuda = pointwise (i0: 96, i1: 56) to_f32(dy[i0, i1]) * exp(to_f32(x[i0, i1]))
  db: f32[56]@cuda = reduce sum (i0: 56; r0: 96) dx[r0, i0]
  return %dx, %db
}"""
"""A loop without reductions of rows, and the sums of its columns."""


def strips_case(text: str, tolerance: float = 2e-5, launch: Launch | None = None) -> Case:
    """A LOOPS graph on a GPU of four multiprocessors, so that few rows make enough strips."""
    ctx = Context(Options(), CostModel({"cuda": replace(H200, multiprocessors=4)}, {}))
    graph = fuse(split_reductions(parse_graph(text).check(), ctx), ctx).check()
    torch.manual_seed(0)
    values = [item for item in graph.inputs if isinstance(item, Value)]
    inputs: Inputs = [torch.randn([int(n) for n in v.shape]).to(v.dtype.torch) for v in values]
    return Case(graph, inputs, tolerance, {0: launch} if launch else None)


CHANNELS = """
graph f(x: f32[6, 3, 530]) {
  s: f32[3] = reduce max (i0: 3; r0: 6, r1: 530) x[r0, i0, r1]
  n: f32[3] = reduce sum (i0: 3; r0: 6, r1: 530) abs(x[r0, i0, r1])
  m: i64[3] = reduce argmax (i0: 3; r0: 6, r1: 530) x[r0, i0, r1]
  y: f32[6, 3, 530] = pointwise (i0: 6, i1: 3, i2: 530) x[i0, i1, i2] * s[i1]
  return %s, %n, %m, %y
}"""
"""Reductions of a channel: a loop over images, inside it one over pixels."""

ROW_VALUES = """
graph f(x: f32[5, 3, 300], label: i64[5, 3], m: f32[3]) {
  c: f32[5, 3, 300] = pointwise (i0: 5, i1: 3, i2: 300) where(index(i2) == label[i0, i1], 1.0:f32, x[i0, i1, i2])
  y: f32[5, 3, 300] = pointwise (i0: 5, i1: 3, i2: 300) c[i0, i1, i2] * m[i1]
  return %y
}"""
"""Values of a whole row in a loop without reductions."""

COLUMNS = """
graph f(x: f32[37, 20]) {
  s: f32[20] = reduce sum (i0: 20; r0: 37) x[r0, i0]
  m: f32[20] = reduce max (i0: 20; r0: 37) x[r0, i0]
  o: f32[20] = pointwise (i0: 20) s[i0] * m[i0]
  return %o, %s
}"""

FULL = """
graph f(x: f32[37, 20]) {
  s: f32[] = reduce sum (; r0: 37, r1: 20) x[r0, r1]
  o: f32[] = pointwise () sqrt(abs(s[]))
  return %o
}"""

TRANSPOSED = """
graph f(x: f32[6, 10], y: bf16[10, 6]) {
  o: f32[10, 6] = pointwise (i0: 10, i1: 6) exp(x[i1, i0]) + to_f32(y[i0, i1])
  return %o
}"""


PERMUTED = """
graph f(x: f32[3, 70, 9, 4]) {
  o: f32[3, 9, 4, 70] = pointwise (i0: 3, i1: 9, i2: 4, i3: 70) x[i0, i3, i1, i2] * 2.0:f32
  return %o
}"""


def column_sum_case() -> Case:
    graph = kernel_graph([value("x", (30, 9))], column_sum(30, 9))
    return Case(on_cuda(graph), [torch.randn(30, 9)], 1e-5)


def gather_case() -> Case:
    """Rows of a table by a data-dependent position, negative ones wrapped, and the scatter that is its gradient."""
    rows, width, count = 11, 6, 40
    at = ex.op("wrap_index", ex.load("at", (I0,), I64), ex.const(rows, I64))
    picked = ex.load("table", (ex.bound(0) * width + I1,), F32, (at,))
    gather = Kernel(
        outs=(value("y", (count, width)),),
        body=(Nest(((I0, count), (I1, width)), (P, V), (Write("y", I0 * width + I1, picked),)),),
    )
    add = Kernel(
        outs=(value("grad2", (rows, width)),),
        body=(
            Nest(
                ((I0, count), (I1, width)),
                (S, V),
                (Write("grad2", ex.bound(0) * width + I1, ex.load("x", (I0 * width + I1,), F32), (at,), "add"),),
            ),
        ),
        targets=("grad",),
    )
    inputs = [value("table", (rows, width)), value("at", (count,), I64), value("x", (count, width))]
    graph = kernel_graph([*inputs, value("grad", (rows, width))], gather, add)
    positions = torch.randint(-rows, rows, (count,))
    data: Inputs = [torch.randn(rows, width), positions, torch.randn(count, width), torch.randn(rows, width)]
    return Case(on_cuda(graph), data, 1e-5)


def padded_case() -> Case:
    """A load under a condition, outside the buffer where it does not hold; and a division that rounds down."""
    inside = ex.op("and", ex.op("ge", ex.index(I0 - 4), ex.const(0, I64)), ex.op("lt", ex.index(I0), ex.const(24, I64)))
    body = ex.masked(inside, ex.load("x", (I0 - 4,), F32), ex.const(-1.5, F32))
    wrapped = ex.to(ex.index(Mod(I0 - 7, sympy.Integer(5))), F32)
    kernels = (pointwise((30,), body, "y"), pointwise((30,), wrapped, "z"))
    return Case(on_cuda(kernel_graph([value("x", (20,))], *kernels)), [torch.randn(20)], 0.0)


def atomic_case(dtype: DType) -> Case:
    """Every element added to one of a few."""
    target = value("acc2", (3,), dtype)
    write = Write("acc2", Mod(I0, sympy.Integer(3)), ex.load("x", (I0,), dtype), mode="add")
    kernel = Kernel(outs=(target,), body=(Nest(((I0, 60),), (S,), (write,)),), targets=("acc",))
    graph = on_cuda(kernel_graph([value("x", (60,), dtype), value("acc", (3,), dtype)], kernel))
    x = torch.randint(-3, 4, (60,)).to(dtype.torch)
    return Case(graph, [x, torch.randint(-3, 4, (3,)).to(dtype.torch)], 0.0)


LOOPED = Launch(block=2, inner=16, persistent=False, num_warps=1)
TILED = Launch(block=8, inner=16, persistent=False, num_warps=1)

CASES: dict[str, Callable[[], Case]] = {
    "ops_f32": lambda: ops_case(F32, 3e-6),
    "ops_f64": lambda: ops_case(F64, 1e-13),
    "ops_f16": lambda: ops_case(F16, 2e-3),
    "ops_bf16": lambda: ops_case(BF16, 1.6e-2),
    "ops_bool": lambda: ops_case(BOOL, 0.0),
    **{f"ops_{dtype.value}": lambda dtype=dtype: ops_case(dtype, 0.0) for dtype in INTS},  # type: ignore[misc]
    **{
        f"to_{dtype.value}": lambda dtype=dtype: conversions_case(dtype)  # type: ignore[misc]
        for dtype in (F32, F64, F16, BF16, *INTS, BOOL)
    },
    "bits": bits_case,
    "rand": lambda: random_case("rand"),
    "randn": lambda: random_case("randn"),
    "softmax_one": lambda: softmax_case(1, 1, F32),
    "softmax": lambda: softmax_case(5, 40, F32),
    "softmax_bf16": lambda: softmax_case(3, 17, BF16),
    "softmax_looped": lambda: softmax_case(3, 40, F32, LOOPED),
    "dynamic": dynamic_case,
    "dynamic_looped": lambda: dynamic_case(LOOPED),
    **{
        f"{kind}_{dtype.value}": lambda kind=kind, dtype=dtype: fold_case(kind, dtype)  # type: ignore[misc]
        for kind in ("sum", "prod", "max", "min", "argmax", "argmin")
        for dtype in (F32, I64, BF16)
    },
    **{
        f"{kind}_looped": lambda kind=kind: fold_case(kind, F32, LOOPED)  # type: ignore[misc]
        for kind in ("sum", "prod", "max", "min", "any", "argmax", "argmin")
    },
    "any": lambda: fold_case("any", BOOL),
    "columns": lambda: fused_case(COLUMNS),
    "columns_looped": lambda: fused_case(COLUMNS, launch=TILED),
    "column_sum": column_sum_case,
    "layer_norm": lambda: fused_case(LAYER_NORM),
    "stored": lambda: fused_case(STORED),
    "stored_looped": lambda: fused_case(STORED, launch=LOOPED),
    "strips": lambda: strips_case(NORM_GRADIENT),
    "strips_one_row": lambda: strips_case(NORM_GRADIENT, launch=Launch(1, 64, True, 2, 3)),
    "strips_flat": lambda: strips_case(BIAS_GRADIENT),
    "strips_blocks": lambda: strips_case(BIAS_GRADIENT, launch=Launch(4, 32, True, 1, 2)),
    "row_values": lambda: fused_case(ROW_VALUES),
    "channels": lambda: fused_case(CHANNELS),
    "channels_looped": lambda: fused_case(CHANNELS, launch=replace(LOOPED, block=1, inner=64)),
    "full": lambda: fused_case(FULL),
    "full_looped": lambda: fused_case(FULL, launch=replace(LOOPED, block=1)),
    "count": lambda: fused_case(COUNT),
    "count_looped": lambda: fused_case(COUNT, launch=LOOPED),
    "cumsum": lambda: scan_case("sum", F32),
    "cumsum_looped": lambda: scan_case("sum", F32, launch=LOOPED),
    "cumsum_columns": lambda: scan_case("sum", F32, "i0"),
    "cumsum_i64_looped": lambda: scan_case("sum", I64, launch=LOOPED),
    "cumprod": lambda: scan_case("prod", F32),
    "logcumsumexp_looped": lambda: scan_case("logaddexp", F32, launch=LOOPED),
    "cummax": lambda: scan_case("cummax", F32),
    "cummin_looped": lambda: scan_case("cummin", I64, launch=LOOPED),
    "split_cumsum": lambda: split_scan_case("sum", F32, (1, 1000)),
    "split_cumsum_bf16": lambda: split_scan_case("sum", BF16, (2, 300)),
    "split_cumsum_i64": lambda: split_scan_case("sum", I64, (3, 200)),
    "split_cumsum_f64_columns": lambda: split_scan_case("sum", F64, (200, 3), "i0"),
    "split_cumsum_columns": lambda: split_scan_case("sum", F32, (3 * 64, 20), "i0"),
    "split_cumprod": lambda: split_scan_case("prod", F32, (1, 3 * 64)),
    "split_logcumsumexp": lambda: split_scan_case("logaddexp", F32, (2, 150)),
    "split_cummax": lambda: split_scan_case("cummax", F32, (1, 500)),
    "split_cummin_i64": lambda: split_scan_case("cummin", I64, (2, 300), length=32),
    "split_without_start": lambda: split_scan_case("no start", F32, (2, 200)),
    "product_bf16": lambda: product_case(linear(40, 24, 72, "bf16"), DOT, tolerance=2e-2),
    "product_f16_transposed": lambda: product_case(TRANSPOSED_LINEAR, DOT, tolerance=2e-3),
    "product_f32": lambda: product_case(linear(33, 17, 32, "f32"), DOT),
    "product_batched": lambda: product_case(BATCHED_PRODUCT, DOT, tolerance=2e-2),
    "product_scaled": lambda: product_case(SCALED_PRODUCT, DOT),
    "batch": lambda: batched_case(BATCH),
    "transposed": lambda: fused_case(TRANSPOSED),
    "transposed_large": lambda: fused_case(re.sub(r"\b10\b", "90", re.sub(r"\b6\b", "70", TRANSPOSED))),
    "transposed_batches": lambda: fused_case(PERMUTED),
    "gather": gather_case,
    "padded": padded_case,
    "atomic_f32": lambda: atomic_case(F32),
    "atomic_i64": lambda: atomic_case(I64),
}  # fmt: skip

Execute = Callable[[str, TritonSignature, Sequence[torch.Tensor], Sequence[int]], None]
"""Runs one function: name, signature, buffers, sizes."""


def module_of(case: Case) -> TritonModule:
    return print_triton(case.graph, case.launches)


def run_case(case: Case, execute: Execute, device: str = "cpu") -> list[torch.Tensor]:
    """The outputs of ``case`` on the CPU, its kernels run by ``execute`` on tensors of ``device``."""
    module, tensors, sizes = module_of(case), dict[str, torch.Tensor](), dict[Any, int]()
    for spec, given in zip(case.graph.inputs, case.inputs, strict=True):
        if isinstance(spec, SizeInput):
            assert isinstance(given, int)
            sizes[spec.symbol] = given
        else:
            assert isinstance(given, torch.Tensor)
            tensors[spec.name] = given.clone().to(device)
    for position, node in enumerate(case.graph.nodes):
        assert isinstance(node, Kernel)
        for out, target in zip(node.outs, node.targets or (None,) * len(node.outs), strict=True):
            shape = [int(as_expr(n).subs(sizes)) for n in out.shape]
            fresh = torch.empty(shape, dtype=out.dtype.torch, device=device)
            tensors[out.name] = tensors[target] if target else fresh
        call = module.calls[position]
        buffers = [tensors[name] for name in call.buffers]
        execute(call.function, module.signatures[call.function], buffers, [sizes[s] for s in call.sizes])
    return [tensors[ref.name].cpu() for ref in case.graph.outputs if isinstance(ref, Ref)]


__all__ = ["CASES", "Case", "module_of", "run_case"]
