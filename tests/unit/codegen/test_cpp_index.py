"""Addresses as C++ text mean what the expressions mean."""

from __future__ import annotations

import operator

import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from dcompile.codegen.cpp_types import index_text
from dcompile.ir.index import FloorDiv, Mod, symbol

NAMES = ("s0", "s1", "i0", "i1")
HELPERS = {"floor_div_index": operator.floordiv, "floor_mod_index": operator.mod}


def cpp_value(text: str, at: dict[str, int]) -> int:
    """What the text computes: ``/`` of operands that are not negative rounds down, and binds like ``*``."""
    return int(eval(text.replace("/", "//").replace("dc::", ""), {**HELPERS, **at}))


def value(expr: sympy.Expr, at: dict[str, int]) -> int | None:
    """What the expression says; None where something is divided by zero."""
    if expr.is_Integer or expr.is_Symbol:
        return int(expr) if expr.is_Integer else at[str(expr)]
    parts = [value(arg, at) for arg in expr.args]
    if None in parts or (isinstance(expr, FloorDiv | Mod) and parts[1] == 0):
        return None
    apply = {FloorDiv: operator.floordiv, Mod: operator.mod, sympy.Pow: operator.pow, sympy.Add: operator.add}
    total = parts[0]
    for part in parts[1:]:
        total = apply.get(expr.func, operator.mul)(total, part)
    return total


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> sympy.Expr:
    if not depth:
        return symbol(draw(st.sampled_from(NAMES)))
    left, right = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    return draw(st.sampled_from([left + right, left * right, left, FloorDiv(left, right), Mod(left, right)]))


@given(expressions(), st.tuples(*(st.integers(1, 9) for _ in NAMES)))
def test_an_address_is_computed_as_written(expr: sympy.Expr, numbers: tuple[int, ...]) -> None:
    at = dict(zip(NAMES, numbers, strict=True))
    want = value(expr, at)
    assume(want is not None)
    assert cpp_value(index_text(expr, str, {}), at) == want


def test_a_product_that_divides_stands_in_parentheses() -> None:
    i, s, t = symbol("i0"), symbol("s0"), symbol("s1")
    assert index_text(FloorDiv(i, s * t), str, {}) == "(i0 / (s0 * s1))"
    assert index_text(Mod(i, s * t) * s, str, {}) == "(i0 % (s0 * s1)) * s0"
