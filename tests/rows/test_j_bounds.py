"""Row J8: bounds of index expressions decide their width: 32 bits where every intermediate value fits, else 64.

No test allocates what it addresses: views of one element, expanded, are as long as one likes.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, tensor

from dcompile.codegen.cpp_types import bounds, index_text
from dcompile.codegen.triton_text import reach
from dcompile.ir.index import FloorDiv, Mod, simplify, symbol, upper_bound
from tests.rows.check import chk

I0, I1 = symbol("i0"), symbol("i1")
EXPRESSIONS = [
    I0 * 7 + I1,
    FloorDiv(I0 + 3, sympy.Integer(4)),
    Mod(I0 * 5 + I1, sympy.Integer(11)),
    I0 - I1,
    FloorDiv(I0 * 3 - I1 * 2, sympy.Integer(5)),
    sympy.Max(I0, I1 * 2) - sympy.Min(I0, 3),
]


@pytest.mark.row("J8")
@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_bounds_hold_for_every_value(expr: sympy.Expr) -> None:
    extents = {I0: 6, I1: 9}
    values = [int(expr.subs({I0: a, I1: b}).doit()) for a in range(6) for b in range(9)]
    known = bounds(expr, extents)
    if known is not None:
        assert known[0] <= min(values)
        assert max(values) <= known[1]
    far = reach(expr, extents)
    assert far is None or max(map(abs, values)) <= far
    top = upper_bound(expr, extents)
    assert top is None or max(values) <= int(top)


@pytest.mark.row("J8")
def test_division_is_narrow_only_where_everything_fits() -> None:
    quotient = FloorDiv(I0, sympy.Integer(3))
    assert "uint32_t" in index_text(quotient, str, {I0: 2**31 - 1})
    assert "uint32_t" not in index_text(quotient, str, {I0: 2**31 + 1})
    assert "uint32_t" not in index_text(FloorDiv(I0 * 4, sympy.Integer(3)), str, {I0: 2**30})
    assert "uint32_t" not in index_text(quotient, str, {I0: symbol("s0")})


@pytest.mark.row("J8")
def test_bounds_drop_divisions_that_cannot_matter() -> None:
    assert simplify(Mod(I0, sympy.Integer(8)), {I0: 8}) == I0
    assert simplify(FloorDiv(I0, sympy.Integer(8)), {I0: 8}) == 0
    assert simplify(Mod(I0, sympy.Integer(8)), {I0: 9}) != I0


LONG = 2**33
"""More elements than 32 bits can count: 32 GiB of f32, were they there."""


@pytest.mark.row("J8")
def test_positions_beyond_32_bits_are_right() -> None:
    one = torch.randn(1)

    def positions(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        long = x.expand(LONG)
        return long[LONG - 5 :] * 2, long[i] + 1, torch.arange(LONG - 3, LONG) // 7

    chk(positions, one, tensor([0, 2**31, 2**32 + 5, LONG - 1]), storage=False)


@pytest.mark.row("J8")
@pytest.mark.parametrize(("rows", "narrow"), [(2**20, True), (2**32, False)])
def test_gpu_kernels_count_in_32_bits_where_they_can(rows: int, narrow: bool) -> None:
    from dcompile.analyse.context import Context
    from dcompile.analyse.cost import CostModel
    from dcompile.codegen.triton import print_triton
    from dcompile.collectives.text import parse_graph
    from dcompile.options import Options
    from dcompile.schedule.fuse import fuse

    graph = parse_graph(f"""
    graph g(x: f32[{rows}]@cuda) {{
      y: f32[{rows}]@cuda = pointwise (i0: {rows}) exp(x[i0])
      return %y
    }}
    """)
    text = print_triton(fuse(graph, Context(Options(), CostModel.analytical("cuda", 1)))).source
    body = text[text.index("def g") :]
    assert ("tl.int64" not in body) == narrow
