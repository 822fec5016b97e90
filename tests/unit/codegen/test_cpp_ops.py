"""Every scalar op in C++ against the reference interpreter, all of them in one translation unit."""

from __future__ import annotations

import pytest
import torch

from dcompile.ir import expr as ex
from dcompile.ir.kernel import Kernel
from dcompile.ir.ops import OPS, SPECIAL_BINARY, SPECIAL_UNARY
from dcompile.ir.types import DType
from dcompile.reference import run_reference
from tests.unit.codegen.kernels import BF16, BOOL, F16, F32, F64, I0, I64, kernel_graph, pointwise, run, value

N = 257
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 0.5, -2.5, 3.5, 1e-40, 1e30]
FLOAT_ONLY = {"div", "pow", "reciprocal", "fma", "sqrt", "rsqrt"}
FLOAT_ONLY |= {name for name, row in OPS.items() if row.flops >= 12}
FLOAT_ONLY -= {"rand", "randn"}
INT_ONLY = {"and", "or", "xor", "not", "shl", "shr"}
OTHER = {"to", "bitcast", "rand", "randn", "wrap_index", "where", *SPECIAL_UNARY, *SPECIAL_BINARY}
NARROW_INTS = (DType.I32, DType.I16, DType.I8, DType.U8)


def numbers(dtype: DType, spread: float = 3.0) -> torch.Tensor:
    if dtype is BOOL:
        return torch.rand(N) > 0.5
    if dtype.is_int:
        return torch.randint(0 if dtype is DType.U8 else -50, 50, (N,)).to(dtype.torch)
    x = torch.randn(N, dtype=torch.float64) * spread
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype.torch)


def check(kernels: dict[str, Kernel], inputs: dict[str, torch.Tensor], rtol: float) -> None:
    """Results of all kernels equal the reference, NaN included."""
    specs = [value(name, x.shape, DType.of(x.dtype) or F32) for name, x in inputs.items()]
    graph = kernel_graph(specs, *kernels.values())
    got, codes = run(graph, list(inputs.values()))
    want = run_reference([graph], [[x.clone() for x in inputs.values()]])[0]
    assert codes == [0] * len(kernels)
    for name, a, b in zip(kernels, got, want, strict=True):
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


def loads(dtype: DType, count: int) -> list[ex.Expr]:
    return [ex.load(name, (I0,), dtype) for name in ("a", "b", "c")[:count]]


@pytest.mark.parametrize(("dtype", "rtol"), [(F32, 2e-6), (F64, 1e-13), (F16, 2e-3), (BF16, 1.6e-2)])
def test_floats(dtype: DType, rtol: float) -> None:
    names = [name for name in OPS if name not in INT_ONLY | OTHER]
    kernels = {name: pointwise((N,), ex.op(name, *loads(dtype, OPS[name].arity)), f"y_{name}") for name in names}
    a, b, c = numbers(dtype), numbers(dtype).roll(5), numbers(dtype).roll(11)
    b[(b != 0) & (b.abs() < 1e-30)] = 0.25  # eager's vectorised remainder gives NaN where a / b overflows
    check(kernels, {"a": a, "b": b, "c": c}, rtol)


@pytest.mark.parametrize("dtype", [I64, *NARROW_INTS])
def test_integers(dtype: DType) -> None:
    names = [name for name in OPS if name not in FLOAT_ONLY | OTHER]
    kernels = {name: pointwise((N,), ex.op(name, *loads(dtype, OPS[name].arity)), f"y_{name}") for name in names}
    b = numbers(dtype)
    b[b == 0] = 7
    b[:3] = 1
    check(kernels, {"a": numbers(dtype), "b": b, "c": numbers(dtype)}, 0.0)


def test_bools() -> None:
    names = ("and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum")
    kernels = {name: pointwise((N,), ex.op(name, *loads(BOOL, OPS[name].arity)), f"y_{name}") for name in names}
    check(kernels, {"a": numbers(BOOL), "b": numbers(BOOL)}, 0.0)


@pytest.mark.parametrize("source", [F32, F64, F16, BF16, I64, *NARROW_INTS, BOOL])
def test_conversions(source: DType) -> None:
    x = ex.load("a", (I0,), source)
    targets = (F32, F64, F16, BF16, I64, *NARROW_INTS, BOOL)
    kernels = {t.value: pointwise((N,), ex.to(x, t), f"y_{t.value}") for t in targets if t is not source}
    data = numbers(source, 30.0)
    if source.is_float:
        data = data.nan_to_num(1.0, 2.0, -2.0).clamp(-120, 120)
        kernels.pop("u8")  # a negative float as unsigned byte has no defined value
    check(kernels, {"a": data}, 0.0)


def test_selection_and_bits() -> None:
    a, b, f = ex.load("a", (I0,), F32), ex.load("b", (I0,), F32), ex.load("f", (I0,), BOOL)
    kernels = {
        "where": pointwise((N,), ex.op("where", f, a, b), "y_where"),
        "bits": pointwise((N,), ex.op("bitcast", a, dtype=DType.I32), "y_bits"),
    }
    check(kernels, {"a": numbers(F32), "b": numbers(F32), "f": numbers(BOOL)}, 0.0)


def test_random_numbers() -> None:
    seed, offset = ex.load("seed", (0,), I64), ex.index(I0)
    kernels = {n: pointwise((N,), ex.op(n, seed, offset, dtype=F32), f"y_{n}") for n in ("rand", "randn")}
    check(kernels, {"seed": torch.tensor([-(2**62) + 12345])}, 5e-5)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_sixteen_bit_float(dtype: DType) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype.torch)
    wide = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32).view(torch.float32)
    ties = (torch.arange(2**16) * 2**15).to(torch.int32).view(torch.float32)  # every half-way pattern of bf16
    narrowed = torch.cat([wide, ties, every.float() * 1.00048828125])
    up = pointwise((every.numel(),), ex.to(ex.load("a", (I0,), dtype), F32), "up")
    down = pointwise((narrowed.numel(),), ex.to(ex.load("b", (I0,), F32), dtype), "down")
    graph = kernel_graph([value("a", every.shape, dtype), value("b", narrowed.shape)], up, down)
    (wider, narrower), codes = run(graph, [every, narrowed])
    assert codes == [0, 0]
    torch.testing.assert_close(wider, every.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrower, narrowed.to(dtype.torch), rtol=0, atol=0, equal_nan=True)
