"""Sizes: from the tracer's symbolic integers to the IR's."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from dcompile.errors import Unsupported
from dcompile.ir.index import SIGNED, FloorDiv, Mod, symbol
from dcompile.ir.types import Origin, Size
from dcompile.lower.hints import USUAL, choose_hints

_FLOOR_DIVISIONS = frozenset({"FloorDiv", "CleanDiv"})
_REMAINDERS = frozenset({"Mod", "PythonMod"})
_ROUNDINGS = frozenset({"FloorToInt", "CeilToInt", "TruncToInt"})
_QUOTIENTS = frozenset({"IntTrueDiv", "FloatTrueDiv"})
_EXACT_DENOMINATOR = 1 << 20
"""Factors such as 0.5 and 1.25 are fractions of a small power of two: products with sizes below 2**33 are exact."""


class Sizes:
    """Converts sizes of one graph, remembering what it has seen.

    Attributes:
        hints: a value of every size symbol: as seen while tracing, or possible for one that depends on data.
        unlearned: symbols that depend on data and that nothing in the graph has told yet.
        origin: reported when a size cannot be expressed; kept up to date by the lowering.
    """

    def __init__(self) -> None:
        self.hints: dict[sympy.Symbol, int] = {}
        self.unlearned: set[sympy.Symbol] = set()
        self.origin = Origin()
        self._names: dict[sympy.Basic, sympy.Symbol] = {}
        self._possible: dict[sympy.Basic, int] = {}
        self._done: dict[sympy.Basic, sympy.Expr] = {}

    def size(self, value: Any) -> Size:
        """An int or SymInt as a Size.

        Raises:
            Unsupported: the size uses arithmetic the IR has no word for.
        """
        if type(value) is int:
            return value
        if isinstance(value, torch.SymInt):
            converted = self.convert(self.expression(value))
            return int(converted) if converted.is_Integer else converted
        return int(value)

    def truth(self, value: Any) -> bool | sympy.Expr:
        """A bool, or a SymBool as an expression that is 1 or 0."""
        if not isinstance(value, torch.SymBool):
            return bool(value)
        converted = self.convert(self.expression(value))
        return bool(converted) if converted.is_Integer else converted

    def sizes(self, values: Any) -> tuple[Size, ...]:
        return tuple(v if type(v) is int else self.size(v) for v in values)

    def expression(self, value: Any) -> sympy.Basic:
        """The tracer's expression of a symbolic value; its symbols are known afterwards."""
        node = value.node
        expr: sympy.Basic = node.expr
        for free in sorted(expr.free_symbols, key=lambda s: str(s)):
            if free not in self._names and not is_float(free):
                self._learn(free, node.shape_env)
        return expr

    def told(self, sizes: Any) -> None:
        """What these sizes hold is known from here on."""
        for size in sizes:
            if not isinstance(size, int):
                self.unlearned -= size.free_symbols

    def _learn(self, free: sympy.Symbol, shape_env: Any) -> None:
        # older versions of torch call the table of seen values var_to_val
        name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
        table = getattr(shape_env, name)
        low = shape_env.var_to_range[free].lower if free in shape_env.var_to_range else 0
        ours = self._names[free] = symbol(free.name if low >= 0 else f"{SIGNED}{free.name}")
        if free in table:
            self.hints[ours] = int(table[free])
            return
        self.unlearned.add(ours)
        if free not in self._possible:
            self._possible |= choose_hints(shape_env, table)
        self.hints[ours] = self._possible.get(free, USUAL)

    def convert(self, expr: sympy.Basic) -> sympy.Expr:
        """``expr`` over IR symbols, with IR floor division and remainder; conditions become 1 or 0.

        Raises:
            Unsupported: a function the IR does not know.
        """
        found = self._done.get(expr)
        if found is None:
            found = self._done[expr] = self._convert(expr)
        return found

    def _convert(self, expr: sympy.Basic) -> sympy.Expr:
        if isinstance(expr, sympy.Symbol):
            return self._names.get(expr) or symbol(expr.name)
        if expr in (sympy.true, sympy.false):
            return sympy.Integer(1 if expr == sympy.true else 0)
        if not expr.args:
            return expr
        kind = type(expr).__name__
        if kind in _ROUNDINGS:
            return self._rounded(kind, expr.args[0])
        if isinstance(expr, sympy.Piecewise):
            return self._choice(expr)
        args = [self.convert(arg) for arg in expr.args]
        if isinstance(expr, sympy.logic.boolalg.Boolean):
            return self._condition(expr, args)
        if kind in _FLOOR_DIVISIONS:
            return FloorDiv(*args)
        if kind in _REMAINDERS:
            return Mod(*args)
        if kind == "ModularIndexing":
            return Mod(FloorDiv(args[0], args[1]), args[2])
        if kind == "CeilDiv":
            return FloorDiv(args[0] + args[1] - 1, args[1])
        if kind == "Identity":
            return args[0]
        if isinstance(expr, sympy.Add | sympy.Mul) or (isinstance(expr, sympy.Pow) and args[1].is_Integer):
            return expr.func(*args)
        if kind == "PowByNatural" and args[1].is_Integer:
            return args[0] ** args[1]
        if kind in ("Max", "Min"):
            return (sympy.Max if kind == "Max" else sympy.Min)(*args)
        raise self._refused(expr)

    def _condition(self, expr: sympy.Basic, args: list[sympy.Expr]) -> sympy.Expr:
        if isinstance(expr, sympy.Not):
            return 1 - args[0]
        if isinstance(expr, sympy.And):
            return sympy.Min(*args)
        if isinstance(expr, sympy.Or):
            return sympy.Max(*args)
        left, right = args
        if isinstance(expr, sympy.StrictLessThan):
            return _positive(right - left)
        if isinstance(expr, sympy.LessThan):
            return _positive(right - left + 1)
        if isinstance(expr, sympy.StrictGreaterThan):
            return _positive(left - right)
        if isinstance(expr, sympy.GreaterThan):
            return _positive(left - right + 1)
        differs = sympy.Max(_positive(left - right), _positive(right - left))
        if isinstance(expr, sympy.Unequality):
            return differs
        if isinstance(expr, sympy.Equality):
            return 1 - differs
        raise self._refused(expr)

    def _choice(self, expr: sympy.Piecewise) -> sympy.Expr:
        chosen = sympy.Integer(0)
        for value, condition in reversed(expr.args):
            holds = self.convert(condition)
            chosen = holds * self.convert(value) + (1 - holds) * chosen
        return sympy.expand(chosen)

    def _rounded(self, kind: str, expr: sympy.Basic) -> sympy.Expr:
        """A size scaled by an exact fraction, rounded: what ``int(n * 0.5)`` and ``math.ceil(n / 3)`` trace to."""
        numerator, denominator = self._fraction(expr)
        if kind == "TruncToInt" and not (numerator.is_nonnegative and denominator.is_nonnegative):
            raise self._refused(expr)
        return FloorDiv(numerator + denominator - 1 if kind == "CeilToInt" else numerator, denominator)

    def _fraction(self, expr: sympy.Basic) -> tuple[sympy.Expr, sympy.Expr]:
        kind = type(expr).__name__
        if expr.is_Integer:
            return expr, sympy.Integer(1)
        if isinstance(expr, sympy.Float):
            exact = sympy.Rational(*float(expr).as_integer_ratio())
            if exact.q > _EXACT_DENOMINATOR:
                raise self._refused(expr)
            return sympy.Integer(exact.p), sympy.Integer(exact.q)
        if kind == "ToFloat":
            return self.convert(expr.args[0]), sympy.Integer(1)
        if kind in _QUOTIENTS:
            (a, b), (c, d) = (self._fraction(arg) for arg in expr.args)
            return a * d, b * c
        if isinstance(expr, sympy.Mul):
            parts = [self._fraction(arg) for arg in expr.args]
            return sympy.Mul(*(p for p, _ in parts)), sympy.Mul(*(q for _, q in parts))
        if getattr(expr, "is_integer", False):
            return self.convert(expr), sympy.Integer(1)
        raise self._refused(expr)

    def _refused(self, expr: sympy.Basic) -> Unsupported:
        return Unsupported(
            self.origin,
            what=f"the size expression {expr}",
            instead="mark the dimension static with torch._dynamo.mark_static, or compute the size outside",
        )

    def hint(self, size: Size) -> int:
        """The size as seen while tracing."""
        if isinstance(size, int):
            return size
        return int(size.xreplace({s: sympy.Integer(v) for s, v in self.hints.items()}))


def is_float(free: sympy.Symbol) -> bool:
    """Whether a symbol of the tracer stands for a float."""
    return free.is_integer is not True


def _positive(expr: sympy.Expr) -> sympy.Expr:
    """1 where the integer ``expr`` is positive, else 0."""
    return sympy.Min(1, sympy.Max(0, expr))
