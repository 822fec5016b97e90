"""The transcendental functions of the prelude over the whole float range, against double precision."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcompile.codegen.cpp import prelude
from dcompile.runtime.toolchain import command, compile_shared, find_compiler

BOUNDS_ULP = {
    "exp": 1.0,
    "exp2": 1.0,
    "expm1": 1.5,
    "log": 1.0,
    "log2": 1.0,
    "log10": 1.0,
    "log1p": 1.0,
    "tanh": 2.5,
    "erf": 1.5,
    "erfc": 2.0,
    "sigmoid": 2.5,
    "rsqrt": 1.5,
    "sin": 2.0,
    "cos": 2.0,
}
"""Largest error seen on every 127th float, rounded up to half an ulp."""

POW_ULP = 0.51
STRIDE = 4093
"""Distance between tested bit patterns; prime, so that all mantissas and exponents meet."""

SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 1e-45, -1e-45, 2.0**-126]
SPECIAL += [88.72283, 88.72284, -87.4, -103.9, -104.1, 3.4e38, 9.0, -10.0, 4.0, 5.0, 0.5, 0.9999999, 1.0000001]
SPECIAL += [2.0**31, 2.0**31 + 256, -(2.0**40)]


def source() -> str:
    loops = [
        f'extern "C" void {name}_all(const float* x, float* y, int64_t n) {{\n#pragma omp simd\n'
        f"  for (int64_t i = 0; i < n; i++) y[i] = dc::{name}_(x[i]);\n}}\n"
        for name in BOUNDS_ULP
    ]
    power = (
        'extern "C" void pow_all(const float* x, const float* e, float* y, int64_t n) {\n#pragma omp simd\n'
        "  for (int64_t i = 0; i < n; i++) y[i] = dc::pow_(x[i], e[i]);\n}\n"
    )
    return "".join([prelude(), *loops, power])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("math") / "math.so"
    compile_shared(source(), path)
    return ctypes.CDLL(str(path))


def call(library: ctypes.CDLL, name: str, *inputs: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(inputs[0])
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out)]
    getattr(library, f"{name}_all")(*pointers, ctypes.c_int64(out.numel()))
    return out


def floats() -> torch.Tensor:
    every = torch.arange(-(2**31), 2**31, STRIDE).to(torch.int32).view(torch.float32)
    return torch.cat([every, torch.tensor(SPECIAL), torch.linspace(-12, 12, 500_001)])


def ulps(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place of ``exact`` (float64); inf where only one is a number."""
    nearest = exact.float()
    wide = got.double()
    exponent = torch.frexp(exact.abs()).exponent.clamp(min=-125, max=128) - 1
    distance = (wide - exact).abs() / torch.exp2((exponent - 23).double())
    same = (wide.isnan() & exact.isnan()) | ((got == nearest) & (got.signbit() == nearest.signbit()))
    both = wide.isfinite() & nearest.isfinite()
    return torch.where(same, distance.nan_to_num(0.0, 0.0).clamp(max=0.5), torch.where(both, distance, float("inf")))


@pytest.mark.parametrize("name", BOUNDS_ULP)
def test_error_bound(library: ctypes.CDLL, name: str) -> None:
    reference: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, name)
    x = floats()
    error = ulps(call(library, name, x), reference(x.double()))
    worst = int(error.argmax())
    assert error[worst] <= BOUNDS_ULP[name], f"{name}({x[worst].item()!r}) is off by {error[worst].item():.2f} ulp"


def test_pow_error_bound(library: ctypes.CDLL) -> None:
    patterns = torch.randint(-(2**31), 2**31, (2, 300_000)).to(torch.int32).view(torch.float32)
    small = torch.randint(-20, 20, (2, 20_000)).float()
    special = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T
    usual = torch.stack([torch.rand(300_000) * 10, torch.randn(300_000) * 8])
    x, e = torch.cat([patterns, small, special, usual], dim=1).contiguous()
    error = ulps(call(library, "pow", x, e), torch.pow(x.double(), e.double()))
    worst = int(error.argmax())
    assert error[worst] <= POW_ULP, f"pow({x[worst].item()!r}, {e[worst].item()!r}) is off by {error[worst].item():.2f}"


def test_loops_vectorise(tmp_path: Path) -> None:
    if "g++" not in find_compiler()[0]:
        pytest.skip("the report is GCC's")
    text = source()
    file = tmp_path / "math.cpp"
    file.write_text(text)
    done = subprocess.run(
        [*command(file, tmp_path / "math.so"), "-fopt-info-vec-optimized"], capture_output=True, text=True, check=True
    )
    reported = {int(line.split(":")[1]) for line in done.stderr.splitlines() if "loop vectorized" in line}
    starts = {n: line for n, line in enumerate(text.splitlines(), 1) if line.startswith('extern "C" void')}
    assert len(starts) == len(BOUNDS_ULP) + 1
    scalar = [line for n, line in starts.items() if not reported & {n, n + 1, n + 2}]
    assert scalar == []
