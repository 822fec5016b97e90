"""Numbers on the host: values read from tensors, arithmetic on floats, and the program's assertions of them.

Integers and truths are size expressions (a truth is 1 or 0). A float is a tensor of no dimensions and type f64,
computed by kernels like any other: reading it back would only stop the program. Where a library call or the caller
needs a Python float it is read there (``Ref.item``).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from dcompile.errors import Unsupported
from dcompile.ir import expr as ex
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.symbolic import CHECK
from dcompile.ir.types import DType, Number, Size, Value
from dcompile.lower.builder import Lowering

ITEM = "aten._local_scalar_dense.default"
_OWN_WORDS = "Runtime assertion failed for expression"
"""How messages begin that the tracer made up; the user's own message for the same fact is preferred."""
_UNARY = {
    "sqrt": "sqrt", "cos": "cos", "cosh": "cosh", "sin": "sin", "sinh": "sinh", "tan": "tan", "tanh": "tanh",
    "asin": "asin", "acos": "acos", "atan": "atan", "exp": "exp", "log": "log", "log2": "log2", "asinh": "asinh",
}  # fmt: skip
Fact = tuple[Size, str, Size]
"""Left side, relation and right side of a check."""


class Numbers:
    """What one lowering knows of numbers.

    Attributes:
        messages: the user's words for a fact, by its normal form.
    """

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.messages: dict[object, str] = {}
        self._floats: dict[str, Value] = {}
        self._checked: set[object] = set()

    # values read from tensors

    def item(self, node: fx.Node, source: Value) -> Any:
        """The number in a tensor of no dimensions."""
        meta = node.meta["val"]
        if isinstance(meta, torch.SymFloat):
            return self._float_item(meta, source)
        if not isinstance(meta, torch.SymInt | torch.SymBool):
            return meta
        sizes = self.lowering.sizes
        free = list(sizes.expression(meta).free_symbols)
        unlearned = [s for s in map(sizes.convert, free) if s in sizes.unlearned]
        value = sizes.truth(meta) if isinstance(meta, torch.SymBool) else sizes.size(meta)
        if len(unlearned) == 1 and len(free) == 1 and (value == unlearned[0] or isinstance(meta, torch.SymBool)):
            self._read(source, Number(unlearned[0].name, sizes.hints[unlearned[0]], 0))
            sizes.told(unlearned)
            return value
        if unlearned:
            raise Unsupported(
                self.lowering.origin, f"a value {value} read from a tensor", "read each number by its own .item()"
            )
        # the tracer knows it from something else: what is read must agree
        found = Number(self.lowering.fresh(f"z_{node.name}"), sizes.hint(value), 0)
        self._read(source, found)
        self._emit_check((symbol(found.name), "==", value), f"{node.name} is not {value}")
        return value

    def _read(self, source: Value, number: Number) -> None:
        self.lowering.emit(
            Extern(outs=(None,), op=ITEM, args=(Ref(source.name),), binds=(number,), origin=self.lowering.origin)
        )

    def _float_item(self, meta: torch.SymFloat, source: Value) -> Value:
        expr = meta.node.expr
        if source.shape == () and source.dtype is DType.F64:
            value = source
        else:
            value = self._scalar("f64", ex.to(self.lowering.element(source, ()), DType.F64))
        if isinstance(expr, sympy.Symbol):
            self._floats[expr.name] = value
        return value

    # arithmetic on floats

    def float(self, meta: torch.SymFloat) -> Value:
        """A float that was computed from sizes and from floats read from tensors."""
        return self._scalar("f64", self._float(self.lowering.sizes.expression(meta)))

    def _scalar(self, suffix: str, expr: ex.Expr) -> Value:
        lowering = self.lowering
        return lowering.pointwise(lowering.temp(suffix, expr.dtype, (), lowering.main_device), expr)

    def _float(self, expr: sympy.Basic) -> ex.Expr:
        kind = type(expr).__name__
        if isinstance(expr, sympy.Symbol) and expr.name in self._floats:
            return self.lowering.element(self._floats[expr.name], ())
        if isinstance(expr, sympy.Float | sympy.Rational) or expr.is_Integer:
            return ex.const(float(expr), DType.F64)
        if kind == "ToFloat" or getattr(expr, "is_integer", False):
            whole = self.lowering.sizes.convert(expr.args[0] if kind == "ToFloat" else expr)
            return ex.to(ex.index(whole), DType.F64)
        args = [self._float(arg) for arg in expr.args]
        if kind in ("IntTrueDiv", "FloatTrueDiv"):
            return ex.op("div", *args)
        if kind in ("FloatPow", "Pow"):
            return ex.op("pow", *args)
        if kind.startswith("OpaqueUnaryFn_") and kind.removeprefix("OpaqueUnaryFn_") in _UNARY:
            return ex.op(_UNARY[kind.removeprefix("OpaqueUnaryFn_")], *args)
        folds = {"Add": "add", "Mul": "mul", "Max": "maximum", "Min": "minimum"}
        if kind not in folds:
            raise Unsupported(
                self.lowering.origin, f"the number {expr}", "compute it with tensor operations, or outside"
            )
        total = args[0]
        for arg in args[1:]:
            total = ex.op(folds[kind], total, arg)
        return total

    def truth(self, meta: torch.SymBool) -> Any:
        """A condition as a size expression; one of floats as a tensor that a number is read from."""
        expr = meta.node.expr
        if all(s.is_integer for s in expr.free_symbols) and not expr.has(sympy.Float):
            return self.lowering.sizes.truth(meta)
        left, right = (self._float(arg) for arg in expr.args)
        relations = {
            "StrictLessThan": "lt", "LessThan": "le", "StrictGreaterThan": "gt", "GreaterThan": "ge", "Equality": "eq",
            "Unequality": "ne",
        }  # fmt: skip
        kind = type(expr).__name__
        if kind not in relations:
            raise Unsupported(self.lowering.origin, f"the condition {expr}", "assert one comparison at a time")
        return self._scalar("holds", ex.op(relations[kind], left, right))

    # assertions

    def note_messages(self, nodes: Any) -> None:
        """Collect the user's words, so that a fact the tracer asserts first fails with them."""
        for node in nodes:
            if str(node.target) != "aten._assert_scalar.default" or not isinstance(node.args[0], fx.Node):
                continue
            meta, message = node.args[0].meta.get("val"), str(node.args[1])
            if isinstance(meta, torch.SymBool) and not message.startswith(_OWN_WORDS):
                for fact in self._facts(meta):
                    self.messages.setdefault(_normal(fact), message)

    def assert_scalar(self, node: fx.Node) -> None:
        """``aten._assert_scalar``: a check at run time, unless it cannot fail or a guard of the tracer holds it."""
        condition, message = node.args[0], str(node.args[1])
        meta = condition.meta.get("val") if isinstance(condition, fx.Node) else condition
        if not isinstance(meta, torch.SymBool):
            if not meta:
                self._emit_check((0, "!=", 0), message)
            return
        for fact in self._facts(meta):
            self._emit_check(fact, self.messages.get(_normal(fact), message))

    def constrain_range(self, node: fx.Node) -> None:
        """``aten.sym_constrain_range``: bounds of a number, at run time where it depends on data."""
        meta = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else node.args[0]
        size = self.lowering.sizes.size(meta)
        limits = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
        low, high = limits.get("min"), limits.get("max")
        if low is None and str(node.target).startswith("aten.sym_constrain_range_for_size"):
            low = 0
        for fact in ((low, "<=", size), (size, "<=", high)):
            if fact[0] is not None and fact[2] is not None and isinstance(size, sympy.Expr):
                self._emit_check(fact, f"{_OWN_WORDS} {fact[0]} <= {fact[2]}")  # type: ignore[arg-type]

    def _facts(self, meta: torch.SymBool) -> list[Fact]:
        expr = meta.node.expr
        parts = expr.args if isinstance(expr, sympy.And) else (expr,)
        return [self._fact(meta, part) for part in parts]

    def _fact(self, meta: torch.SymBool, expr: sympy.Basic) -> Fact:
        sizes = self.lowering.sizes
        if not all(s.is_integer for s in expr.free_symbols) or expr.has(sympy.Float):
            number = Number(self.lowering.fresh("z_holds"), 1, 0)
            self._read(self.truth(meta), number)
            return symbol(number.name), "!=", 0
        sizes.expression(meta)
        sides = {
            sympy.StrictLessThan: "<", sympy.LessThan: "<=", sympy.Equality: "==", sympy.Unequality: "!=",
        }  # fmt: skip
        for kind, relation in sides.items():
            if type(expr) is kind:
                return sizes.convert(expr.args[0]), relation, sizes.convert(expr.args[1])
        for kind, relation in {sympy.StrictGreaterThan: "<", sympy.GreaterThan: "<="}.items():
            if type(expr) is kind:
                return sizes.convert(expr.args[1]), relation, sizes.convert(expr.args[0])
        return sizes.convert(expr), "!=", 0

    def _emit_check(self, fact: Fact, message: str) -> None:
        key = _normal(fact)
        known = all(not isinstance(s, sympy.Expr) or s.is_Integer for s in (fact[0], fact[2]))
        backed = not known and not self._learned_symbols(fact)
        if key in self._checked or key is True or backed:
            return
        self._checked.add(key)
        args = tuple(int(a) if isinstance(a, sympy.Integer) else a for a in (*fact, message))
        self.lowering.emit(Extern(outs=(), op=CHECK, args=args, effect=True, origin=self.lowering.origin))

    def _learned_symbols(self, fact: Fact) -> bool:
        """Whether the fact is about something the program learns; of anything else the tracer's guards take care."""
        told = self.lowering.learned
        return any(isinstance(side, sympy.Expr) and side.free_symbols & told for side in (fact[0], fact[2]))


def _normal(fact: Fact) -> object:
    """The same for facts that say the same; True for what holds always."""
    left, relation, right = fact
    gap = sympy.expand(sympy.sympify(right) - sympy.sympify(left))
    if relation in ("<", "<="):
        gap = gap - 1 if relation == "<" else gap
        return True if gap.is_Integer and gap >= 0 else ("<=", gap)
    if gap.is_Integer and (gap == 0) == (relation == "=="):
        return True
    return relation, frozenset((gap, sympy.expand(-gap)))
