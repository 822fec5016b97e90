"""Integer expressions of sizes and indices: sympy plus floor division and modulo that simplify under variable ranges.

``FloorDiv`` and ``Mod`` follow Python: the quotient rounds to minus infinity and the remainder has the divisor's sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy

from dcompile.ir.types import Size

Ranges: TypeAlias = Mapping[sympy.Symbol, Size]
"""Each loop variable v with its extent n: 0 <= v < n."""


SIGNED = "z_"
"""How the names of symbols begin that may be negative: integers that are no sizes."""


@lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """The integer symbol of that name. Loop variables ``i0, r0``, bound values ``q0``, sizes ``s0``, other integers
    ``z_s1``; all but the last are never negative."""
    if name.startswith(SIGNED):
        return sympy.Symbol(name, integer=True)
    return sympy.Symbol(name, integer=True, nonnegative=True)


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``a // b`` rounding down."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if b == 1 or a == 0:
            return a
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        if a == b:
            return sympy.Integer(1)
        if isinstance(a, FloorDiv):
            return FloorDiv(a.args[0], a.args[1] * b)
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative and self.args[1].is_nonnegative else None


class Mod(sympy.Function):  # type: ignore[misc]
    """``a % b`` with the sign of ``b``."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if b == 1 or a == 0 or a == b:
            return sympy.Integer(0)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) % int(b))
        if isinstance(a, Mod) and a.args[1] == b:
            return a
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[1].is_nonnegative else None


def as_size(value: object) -> Size:
    """Plain int when the value is a known integer, the sympy expression otherwise."""
    if isinstance(value, int):
        return int(value)
    expr = sympy.sympify(value)
    return int(expr) if expr.is_Integer else expr


def as_expr(value: Size) -> sympy.Expr:
    return sympy.Integer(value) if isinstance(value, int) else value


def product(sizes: tuple[Size, ...]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return as_size(total)


def upper_bound(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr | None:
    """An inclusive upper bound of a non-negative expression under ``ranges``, or None when none is seen."""
    if expr.is_Integer:
        return expr
    if expr.is_Symbol:
        return as_expr(ranges[expr]) - 1 if expr in ranges else expr
    if isinstance(expr, Mod):
        top = upper_bound(expr.args[0], ranges)
        if top is not None and top.is_Integer and expr.args[1].is_Integer and top < expr.args[1]:
            return top
        return expr.args[1] - 1
    if isinstance(expr, FloorDiv):
        top = upper_bound(expr.args[0], ranges)
        return None if top is None else FloorDiv(top, expr.args[1])
    if isinstance(expr, sympy.Add | sympy.Mul):
        parts = [upper_bound(arg, ranges) for arg in expr.args]
        if any(part is None for part in parts) or not all(arg.is_nonnegative for arg in expr.args):
            return None
        return sympy.expand(expr.func(*parts))
    return None


def _split_multiple(expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """``expr == quotient * divisor + rest`` where the quotient collects the terms seen to be multiples."""
    quotient, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expr)):
        coefficient, factors = term.as_coeff_Mul()
        if divisor.is_Integer and coefficient.is_Integer and int(coefficient) % int(divisor) == 0:
            quotient += (coefficient / divisor) * factors
        elif (
            not divisor.is_Integer
            and (ratio := sympy.cancel(term / divisor)).is_polynomial()
            and all(c.is_Integer for c in ratio.as_coefficients_dict().values())
        ):
            quotient += ratio
        else:
            rest += term
    return quotient, rest


def _below(expr: sympy.Expr, limit: sympy.Expr, ranges: Ranges) -> bool:
    """Whether 0 <= expr < limit is certain."""
    if not (expr.is_Integer and expr >= 0) and not expr.is_nonnegative:
        return False
    top = upper_bound(expr, ranges)
    if top is None:
        return False
    gap = sympy.expand(limit - top)
    return bool(gap.is_positive)


@lru_cache(maxsize=65536)
def _simplify(expr: sympy.Expr, ranges: tuple[tuple[sympy.Symbol, Size], ...]) -> sympy.Expr:
    if not expr.has(FloorDiv, Mod):
        return sympy.expand(expr)
    bounds = dict(ranges)
    args = [_simplify(arg, ranges) for arg in expr.args]
    if isinstance(expr, FloorDiv | Mod):
        value, divisor = args
        quotient, rest = _split_multiple(value, divisor)
        if isinstance(expr, Mod):
            if _below(rest, divisor, bounds):
                return rest
            if divisor.is_Integer and isinstance(rest, Mod) and rest.args[1].is_Integer and rest.args[1] % divisor == 0:
                return _simplify(Mod(rest.args[0], divisor), ranges)
            return Mod(rest, divisor)
        if _below(rest, divisor, bounds):
            return quotient
        inner = _pull_common(rest, divisor)
        return quotient + (_simplify(inner, ranges) if inner != FloorDiv(rest, divisor) else inner)
    return _join_div_mod(sympy.expand(expr.func(*args)), ranges)


def _pull_common(value: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """``(g*a + c)//(g*b) == a//b`` for an integer g > c >= 0 that divides every other term."""
    if not divisor.is_Integer:
        return FloorDiv(value, divisor)
    terms = sympy.Add.make_args(value)
    constant = sum((term for term in terms if term.is_Integer), sympy.Integer(0))
    others = [term for term in terms if not term.is_Integer]
    g = divisor
    for term in others:
        g = sympy.gcd(g, term.as_coeff_Mul()[0])
    if g == 1 or not constant >= 0 or not others:
        return FloorDiv(value, divisor)
    return FloorDiv(sum((term / g for term in others), constant // g), divisor / g)


def _join_div_mod(expr: sympy.Expr, ranges: tuple[tuple[sympy.Symbol, Size], ...]) -> sympy.Expr:
    """``n*c*(a//n) + c*(a % n) == c*a`` and ``n*c*((a//n) % m) + c*(a % n) == c*(a % (n*m))``."""
    if not isinstance(expr, sympy.Add) or not expr.has(Mod):
        return expr
    for term in expr.args:
        coefficient, factor = term.as_coeff_Mul()
        if not isinstance(factor, Mod):
            continue
        a, n = factor.args
        whole = coefficient * n * FloorDiv(a, n)
        if whole in expr.args:
            return _simplify(expr - term - whole + coefficient * a, ranges)
        for other in expr.args:
            c2, f2 = other.as_coeff_Mul()
            if isinstance(f2, Mod) and f2.args[0] == FloorDiv(a, n) and c2 == coefficient * n:
                return _simplify(expr - term - other + coefficient * Mod(a, n * f2.args[1]), ranges)
    return expr


def simplify(expr: sympy.Expr | int, ranges: Ranges) -> sympy.Expr:
    """Rewrite ``expr`` to an equal, usually shorter one given that every variable stays in its range."""
    return _simplified(sympy.sympify(expr), tuple(ranges.items()))


@lru_cache(maxsize=65536)
def _simplified(expr: sympy.Expr, pairs: tuple[tuple[sympy.Symbol, Size], ...]) -> sympy.Expr:
    ranges = dict(pairs)
    if expr.is_Symbol or expr.is_Integer:
        return sympy.Integer(0) if expr in ranges and ranges[expr] == 1 else expr
    ones = {var: 0 for var, size in ranges.items() if size == 1}
    if ones:
        expr = expr.subs(ones)
    used = expr.free_symbols
    key = tuple(sorted(((v, n) for v, n in ranges.items() if v in used), key=lambda item: item[0].name))
    return _simplify(expr, key)


@lru_cache(maxsize=65536)
def replaced(expr: sympy.Expr, pairs: tuple[tuple[sympy.Symbol, sympy.Expr], ...]) -> sympy.Expr:
    """``expr`` with each first symbol of a pair replaced by the second, all at once."""
    return expr.xreplace(dict(pairs))


def flatten_index(index: tuple[sympy.Expr, ...], stride: tuple[Size, ...]) -> sympy.Expr:
    """The address ``sum(index * stride)``, in elements."""
    return _weighted_sum(tuple(index), tuple(stride))


@lru_cache(maxsize=65536)
def _weighted_sum(terms: tuple[sympy.Expr, ...], weights: tuple[Size, ...]) -> sympy.Expr:
    return sympy.expand(sum((term * weight for term, weight in zip(terms, weights, strict=True)), sympy.Integer(0)))


def unflatten(flat: sympy.Expr, shape: tuple[Size, ...]) -> tuple[sympy.Expr, ...]:
    """Row-major coordinates of a flat position inside ``shape`` (no outermost modulo: the position is in range).

    A shape without elements has no positions; sizes of 0 count as 1 there.
    """
    shape = tuple(1 if size == 0 else size for size in shape)
    index: list[sympy.Expr] = []
    step: Size = 1
    for axis in reversed(range(len(shape))):
        position = FloorDiv(flat, as_expr(step)) if step != 1 else flat
        index.append(position if axis == 0 else Mod(position, as_expr(shape[axis])))
        step = step * shape[axis]
    return tuple(reversed(index))


def stride_of(expr: sympy.Expr, var: sympy.Symbol) -> sympy.Expr | None:
    """How far the address moves when ``var`` grows by one; None if that is not a constant."""
    step = sympy.expand(expr.subs(var, var + 1) - expr) if expr.has(var) else sympy.Integer(0)
    return None if step.has(var) or step.has(FloorDiv) or step.has(Mod) else step
