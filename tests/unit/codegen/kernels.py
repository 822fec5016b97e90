"""Hand-made kernels and a way to run them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from dcompile.codegen.cpp import CppModule, print_cpp
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import as_expr, symbol
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Nest, Role, Stmt, Write
from dcompile.ir.nodes import Axis, Ref
from dcompile.ir.types import DType, Origin, Size, Value, contiguous_stride
from dcompile.runtime.toolchain import compile_shared, load_functions

P, S, V = Role.PARALLEL, Role.SERIAL, Role.SIMD
I0, I1, I2, R0, R1 = (symbol(name) for name in ("i0", "i1", "i2", "r0", "r1"))
F32, F64, BF16, F16, I64, BOOL = DType.F32, DType.F64, DType.BF16, DType.F16, DType.I64, DType.BOOL


def value(name: str, shape: Sequence[Size], dtype: DType = F32) -> Value:
    return Value(name, dtype, tuple(shape), contiguous_stride(tuple(shape)))


def kernel_graph(inputs: Sequence[Value | SizeInput], *kernels: Kernel) -> Graph:
    """A graph of kernels that returns everything they write."""
    outs = tuple(Ref(out.name) for kernel in kernels for out in kernel.outs)
    return Graph("forward", tuple(inputs), kernels, outs).check()


@lru_cache(maxsize=8)
def library(source: str) -> Path:
    """The compiled unit; a test that runs one graph several times compiles it once."""
    path = Path(tempfile.mkdtemp(prefix="dcompile-test-")) / "kernels.so"
    compile_shared(source, path)
    return path


def build(module: CppModule) -> dict[str, Callable[..., int]]:
    return load_functions(library(module.source), module.signatures)


def run(graph: Graph, inputs: Sequence[torch.Tensor | int], threads: int = 1) -> tuple[list[torch.Tensor], list[int]]:
    """Outputs and return codes. A target's next version shares its (cloned) storage."""
    module = print_cpp(graph)
    functions = build(module)
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[object, int] = {}
    for spec, given in zip(graph.inputs, inputs, strict=True):
        if isinstance(spec, SizeInput):
            assert isinstance(given, int)
            sizes[spec.symbol] = given
        else:
            assert isinstance(given, torch.Tensor)
            tensors[spec.name] = given.clone()
    codes = []
    for position, node in enumerate(graph.nodes):
        assert isinstance(node, Kernel)
        targets = node.targets or (None,) * len(node.outs)
        for out, target in zip(node.outs, targets, strict=True):
            shape = [int(as_expr(n).subs(sizes)) for n in out.shape]
            tensors[out.name] = tensors[target] if target else torch.empty(shape, dtype=out.dtype.torch)
        call = module.calls[position]
        pointers = [tensors[name].data_ptr() for name in call.buffers]
        codes.append(functions[call.function](*pointers, *(sizes[s] for s in call.sizes), threads))
    return [tensors[ref.name] for ref in graph.outputs if isinstance(ref, Ref)], codes


def softmax(rows: Size, columns: Size, dtype: DType = F32) -> Kernel:
    """Row softmax: three passes over a row that stays in cache."""
    x = ex.to(ex.load("x", (I0 * columns + R0,), dtype), F32)
    top = ex.local("top", F32)
    shifted = ex.op("exp", ex.op("sub", x, top))
    result = ex.to(ex.op("div", shifted, ex.local("total", F32)), dtype)
    body = (
        Fold(((R0, columns),), (V,), (Accumulator("top", "max", x),)),
        Fold(((R0, columns),), (V,), (Accumulator("total", "sum", shifted),)),
        Nest(((R0, columns),), (V,), (Write("y", I0 * columns + R0, result),)),
    )
    origin = Origin(("aten.softmax.int",), "model.py:7")
    return Kernel(outs=(value("y", (rows, columns), dtype),), body=(Nest(((I0, rows),), (P,), body),), origin=origin)


def column_sum(rows: Size, columns: Size, role: Role = V) -> Kernel:
    """``y[c] = sum over r of x[r, c]``, columns in lanes."""
    x = ex.load("x", (R0 * columns + I0,), F32)
    fold = Fold(((R0, rows),), (S,), (Accumulator("total", "sum", x),))
    write: Stmt = Write("y", I0, ex.local("total", F32))
    body = (Nest(((I0, columns),), (role,), (fold, write)),)
    return Kernel(outs=(value("y", (columns,)),), body=body, origin=Origin(("aten.sum.dim_IntList",), "model.py:9"))


def pointwise(shape: Sequence[int], expr: ex.Expr, out: str = "y") -> Kernel:
    """``out[i0] = expr`` over the flat elements; ``expr`` loads at address ``I0``."""
    numel = 1
    for size in shape:
        numel *= size
    axis: Axis = (I0, numel)
    body = (Nest((axis,), (V,), (Write(out, I0, expr),)),)
    return Kernel(outs=(value(out, shape, expr.dtype),), body=body, origin=Origin(("aten.add.Tensor",), "model.py:3"))
