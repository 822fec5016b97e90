"""Sizes: from the tracer's symbolic integers to the IR's."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from dcompile.errors import Unsupported
from dcompile.ir.index import FloorDiv, Mod, symbol
from dcompile.ir.types import Origin, Size

_FLOOR_DIVISIONS = frozenset({"FloorDiv", "CleanDiv"})
_REMAINDERS = frozenset({"Mod", "PythonMod"})


class Sizes:
    """Converts sizes of one graph, remembering what it has seen.

    Attributes:
        hints: value of every size symbol as seen while tracing.
        origin: reported when a size cannot be expressed; kept up to date by the lowering.
    """

    def __init__(self) -> None:
        self.hints: dict[sympy.Symbol, int] = {}
        self.origin = Origin()
        self._done: dict[sympy.Basic, sympy.Expr] = {}

    def size(self, value: Any) -> Size:
        """An int or SymInt as a Size.

        Raises:
            Unsupported: the size depends on tensor data, or uses arithmetic the IR has no word for.
        """
        if type(value) is int:
            return value
        if isinstance(value, torch.SymInt):
            node = value.node
            expr = node.expr
            if expr.is_Integer:
                return int(expr)
            for free in expr.free_symbols:
                self._learn(free, node.shape_env)
            converted = self.convert(expr)
            return int(converted) if converted.is_Integer else converted
        return int(value)

    def sizes(self, values: Any) -> tuple[Size, ...]:
        return tuple(v if type(v) is int else self.size(v) for v in values)

    def _learn(self, free: sympy.Symbol, shape_env: Any) -> None:
        ours = symbol(free.name)
        if ours in self.hints:
            return
        # older versions of torch call the table of seen values var_to_val
        name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
        table = getattr(shape_env, name)
        if free not in table:
            raise Unsupported(
                self.origin,
                what=f"a tensor size that depends on tensor data ({free})",
                instead="keep the op that produces it outside the compiled function, or pad to a fixed size",
            )
        self.hints[ours] = int(table[free])

    def convert(self, expr: sympy.Basic) -> sympy.Expr:
        """``expr`` over IR symbols, with IR floor division and remainder.

        Raises:
            Unsupported: a function the IR does not know.
        """
        found = self._done.get(expr)
        if found is None:
            found = self._done[expr] = self._convert(expr)
        return found

    def _convert(self, expr: sympy.Basic) -> sympy.Expr:
        if isinstance(expr, sympy.Symbol):
            return symbol(expr.name)
        if not expr.args:
            return expr
        args = [self.convert(arg) for arg in expr.args]
        kind = type(expr).__name__
        if kind in _FLOOR_DIVISIONS:
            return FloorDiv(*args)
        if kind in _REMAINDERS:
            return Mod(*args)
        if kind == "ModularIndexing":
            return Mod(FloorDiv(args[0], args[1]), args[2])
        if kind == "CeilDiv":
            return FloorDiv(args[0] + args[1] - 1, args[1])
        if isinstance(expr, sympy.Add | sympy.Mul) or (isinstance(expr, sympy.Pow) and args[1].is_Integer):
            return expr.func(*args)
        if kind in ("Max", "Min"):
            return (sympy.Max if kind == "Max" else sympy.Min)(*args)
        raise Unsupported(
            self.origin,
            what=f"the size expression {expr}",
            instead="mark the dimension static with torch._dynamo.mark_static, or compute the size outside",
        )

    def hint(self, size: Size) -> int:
        """The size as seen while tracing."""
        if isinstance(size, int):
            return size
        return int(size.xreplace({s: sympy.Integer(v) for s, v in self.hints.items()}))
