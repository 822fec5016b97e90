"""Special functions of the C++ printer against PyTorch's in float64, all in one translation unit."""

from __future__ import annotations

import torch

from dcompile.ir import expr as ex
from dcompile.ir.ops import SPECIAL_BINARY, SPECIAL_UNARY
from dcompile.reference import run_reference
from tests.unit.codegen.kernels import F32, F64, I0, kernel_graph, pointwise, run, value

N = 400
UNIT = {"special_ndtri", "special_erfinv"}
"""Functions of probabilities."""
LOOSE = dict.fromkeys(("special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1"), 1e-6) | {
    "special_airy_ai": 1e-5
}
"""PyTorch's own errors in float64: its J0 is 3.6e-7 off at 5.04, its Ai 2.8e-6 at -2.1."""


def test_special_functions_equal_eager() -> None:
    kernels = []
    for name in SPECIAL_UNARY:
        operand = ex.load("p" if name in UNIT else "x", (I0,), F64)
        kernels.append(pointwise((N,), ex.op(name, operand), f"y_{name}"))
    order = ex.load("n", (I0,), F64)
    for name in SPECIAL_BINARY:
        x, y = ex.load("x", (I0,), F64), ex.load("y", (I0,), F64)
        polynomial = name.split("_")[1] in ("chebyshev", "shifted", "hermite", "laguerre", "legendre")
        if name == "special_polygamma":
            found = ex.op(name, ex.const(2.0, F64), y)
        else:
            found = ex.op(name, ex.load("c", (I0,), F64), order) if polynomial else ex.op(name, x, y)
        kernels.append(pointwise((N,), found, f"y_{name}"))
    x = torch.cat([torch.linspace(-12, 14, N - 4, dtype=torch.float64), torch.tensor([0.0, 30.0, -1.0, torch.nan])])
    inputs = {
        "x": x,
        "p": torch.cat([torch.linspace(1e-12, 1, N - 2), torch.tensor([0.0, 1.0])]).double(),
        "c": torch.linspace(-1.0, 1.0, N, dtype=torch.float64),
        "n": torch.arange(N, dtype=torch.float64) % 12 - 1,
        "y": torch.rand(N, dtype=torch.float64) * 20 + 0.1,
    }
    graph = kernel_graph([value(name, t.shape, F64) for name, t in inputs.items()], *kernels)
    got, codes = run(graph, list(inputs.values()))
    want = run_reference([graph], [[t.clone() for t in inputs.values()]])[0]
    assert codes == [0] * len(kernels)
    for name, a, b in zip((*SPECIAL_UNARY, *SPECIAL_BINARY), got, want, strict=True):
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=LOOSE.get(name, 1e-10), equal_nan=True, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_known_values() -> None:
    """From tables: Abramowitz and Stegun 9.8, 10.11, 6.1, 26.1 and 23.2."""
    table = {
        ("special_i0", 1.0): 1.2660658777520084,
        ("special_k1", 1.0): 0.6019072301972346,
        ("special_bessel_j0", 1.0): 0.7651976865579666,
        ("special_airy_ai", 0.0): 0.3550280538878172,
        ("special_digamma", 1.0): -0.5772156649015329,
        ("special_ndtri", 0.975): 1.959963984540054,
        ("special_erfcx", 10.0): 0.05614099274382259,
    }
    kernels = [pointwise((1,), ex.op(name, ex.const(x, F64)), f"y{n}") for n, (name, x) in enumerate(table)]
    got, _ = run(kernel_graph([value("unused", (1,), F64)], *kernels), [torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(
        torch.cat(got), torch.tensor(list(table.values()), dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_floats_are_the_rounded_doubles() -> None:
    x = torch.linspace(0.1, 9, 50)
    names = ("special_i0e", "special_k0", "special_digamma", "special_erfcx")
    found = []
    for dtype in (F32, F64):
        kernels = (pointwise((50,), ex.op(name, ex.load("x", (I0,), dtype)), f"y_{name}") for name in names)
        got, _ = run(kernel_graph([value("x", x.shape, dtype)], *kernels), [x.to(dtype.torch)])
        found.append([t.float() for t in got])
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=0.0)
