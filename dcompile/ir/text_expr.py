"""Text form of scalar expressions.

Grammar::

    exprs   = ["let" name "=" expr, ... "in"] expr           # a sub-expression used more than once is named once
    expr    = sum [("==" | "!=" | "<" | "<=" | ">" | ">=") sum]
    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/" | "//" | "%") atom)*
    atom    = ["-"] number ":" dtype | ("inf" | "nan") ":" dtype | "true" | "false"
            | buffer "[" index, ... [bind] "]"               # a load
            | "index" ["_" dtype] "(" index [bind] ")"       # i64 unless given
            | op ["_" dtype] "(" expr, ... ")"               # the dtype for to, bitcast, rand, randn
            | "masked" "(" cond "," body "," other ")"
            | name                                           # a scalar named by a let or a fold
            | "(" expr ")"
    bind    = "|" q0 "=" expr, ...

dtypes are inferred: a load has its buffer's, a name its definition's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.ops import OPS, Result
from dcompile.ir.text_index import print_index, read_index
from dcompile.ir.tokens import Cursor, quote_name
from dcompile.ir.types import DType, Value

_COMPARE, _ADD, _MUL, _ATOM = range(4)
_INFIX = {
    "eq": ("==", _COMPARE), "ne": ("!=", _COMPARE), "lt": ("<", _COMPARE), "le": ("<=", _COMPARE),
    "gt": (">", _COMPARE), "ge": (">=", _COMPARE), "add": ("+", _ADD), "sub": ("-", _ADD), "mul": ("*", _MUL),
    "div": ("/", _MUL), "floordiv": ("//", _MUL), "mod": ("%", _MUL),
}  # fmt: skip
_SIGN_OP = {sign: (name, level) for name, (sign, level) in _INFIX.items()}
_DTYPES = {d.value: d for d in DType}

DEEPEST_NESTING = 24
"""Operators nested deeper than this are named by a let: beyond it a line is unreadable, and the parser's stack (about
five Python frames a level, limit 1000) stays far from its end."""


def print_exprs(roots: Sequence[ex.Expr]) -> tuple[str, tuple[str, ...]]:
    """The let list (``""``, or ending in ``"in "``) shared by ``roots`` and the text of each root."""
    order = list(dict.fromkeys(node for root in roots for node in ex.walk(root)))
    uses: dict[ex.Expr, int] = dict.fromkeys(order, 0)
    for node in order:
        for child in node.children:
            uses[child] += 1
    for root in roots:
        uses[root] += 1
    taken = {node.name for node in order if isinstance(node, ex.Local)}
    fresh = (name for n in range(len(order) + len(taken)) if (name := f"c{n}") not in taken)
    text: dict[ex.Expr, tuple[str, int]] = {}
    depth: dict[ex.Expr, int] = {}
    lets: list[str] = []
    for node in order:
        text[node] = _node_text(node, text)
        depth[node] = 1 + max((depth[child] for child in node.children), default=0)
        if node.children and (uses[node] > 1 or depth[node] > DEEPEST_NESTING):
            name = next(fresh)
            lets.append(f"{name} = {text[node][0]}")
            text[node], depth[node] = (name, _ATOM), 1
    return f"let {', '.join(lets)} in " if lets else "", tuple(text[root][0] for root in roots)


def print_expr(root: ex.Expr) -> str:
    """The text of one expression."""
    lets, (text,) = print_exprs((root,))
    return lets + text


def print_expr_list(roots: Sequence[ex.Expr]) -> str:
    """``(expr, ...)`` with what they share before them."""
    lets, texts = print_exprs(roots)
    return f"({lets}{', '.join(texts)})"


def _node_text(node: ex.Expr, text: Mapping[ex.Expr, tuple[str, int]]) -> tuple[str, int]:
    """Text of ``node`` given its children's, and the level of its outermost operator."""
    if isinstance(node, ex.Const):
        return _const_text(node), _ATOM
    if isinstance(node, ex.Local):
        return quote_name(node.name), _ATOM
    bind = print_bind(tuple(text[b][0] for b in node.children)) if isinstance(node, ex.Index | ex.Load) else ""
    if isinstance(node, ex.Index):
        suffix = "" if node.dtype is DType.I64 else f"_{node.dtype.value}"
        return f"index{suffix}({print_index(node.expr)}{bind})", _ATOM
    if isinstance(node, ex.Load):
        return f"{quote_name(node.buffer)}[{print_position(node.index)}{bind}]", _ATOM
    args = [text[child] for child in node.children]
    if isinstance(node, ex.Op) and node.name in _INFIX:
        sign, level = _INFIX[node.name]
        (left, left_level), (right, right_level) = args
        left = left if left_level >= level + (level == _COMPARE) else f"({left})"
        return f"{left} {sign} {right if right_level > level else f'({right})'}", level
    name = "masked"
    if isinstance(node, ex.Op):
        name = node.name + (f"_{node.dtype.value}" if OPS[node.name].result is Result.GIVEN else "")
    return f"{name}({', '.join(arg for arg, _ in args)})", _ATOM


def _const_text(node: ex.Const) -> str:
    if node.dtype is DType.BOOL:
        return "true" if node.value else "false"
    return f"{node.value!r}:{node.dtype.value}"


def print_position(index: Iterable[sympy.Expr]) -> str:
    return ", ".join(print_index(i) for i in index)


def print_bind(texts: Sequence[str]) -> str:
    """The bindings of an index as they stand inside its brackets, given each one's text."""
    return " | " + ", ".join(f"q{n} = {text}" for n, text in enumerate(texts)) if texts else ""


class ExprReader(Cursor):
    """A cursor that knows the dtypes of buffers and of named scalars.

    Attributes:
        buffers: dtype of each buffer that may be loaded.
        scalars: each named scalar with the expression that stands for it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.buffers: dict[str, DType] = {}
        self.scalars: dict[str, ex.Expr] = {}

    def expr(self) -> ex.Expr:
        """``["let" ... "in"] expr``; the lets are known in this expression only."""
        outer = self.scalars
        self.read_lets()
        found = self.operand()
        self.scalars = outer
        return found

    def expr_list(self) -> tuple[ex.Expr, ...]:
        """``"(" ["let" ... "in"] expr, ... ")"``; the lets are known inside the parentheses only."""
        outer = self.scalars
        self.expect("(")
        self.read_lets()
        found = [self.operand()]
        while self.accept(","):
            found.append(self.operand())
        self.expect(")")
        self.scalars = outer
        return tuple(found)

    def read_lets(self) -> None:
        """Consume a let list if there is one; its names are known until the caller restores ``scalars``."""
        if not self.accept("let"):
            return
        self.scalars = dict(self.scalars)
        while True:
            name = self.name("the name of a shared sub-expression")
            self.expect("=")
            self.scalars[name] = self.operand()
            if not self.accept(","):
                break
        self.expect("in")

    def operand(self, level: int = _COMPARE) -> ex.Expr:
        """An expression whose operators bind at least as tightly as ``level``."""
        left = self._atom()
        while True:
            token = self.peek()
            found = _SIGN_OP.get(token.text) if token.kind == "sign" else None
            if found is None or found[1] < level:
                return left
            self.next()
            right = self.operand(found[1] + 1)
            try:
                left = ex.op(found[0], left, right)
            except ValueError as error:
                self.fail(f"operands of one dtype ({error})", token)

    def position(self) -> tuple[tuple[sympy.Expr, ...], tuple[ex.Expr, ...]]:
        """``"[" index, ... [bind] "]"``."""
        self.expect("[")
        index: list[sympy.Expr] = []
        while not self.at("]", "|"):
            index.append(read_index(self))
            if not self.accept(","):
                break
        bind = self._bind()
        self.expect("]")
        return tuple(index), bind

    def _bind(self) -> tuple[ex.Expr, ...]:
        bind: list[ex.Expr] = []
        if self.accept("|"):
            while True:
                self.expect(f"q{len(bind)}")
                self.expect("=")
                bind.append(self.operand())
                if not self.accept(","):
                    break
        return tuple(bind)

    def dtype(self) -> DType:
        if self.peek().text not in _DTYPES:
            self.fail(f"a dtype ({', '.join(_DTYPES)})")
        return _DTYPES[self.next().text]

    def _atom(self) -> ex.Expr:
        token = self.peek()
        if token.kind in ("int", "float") or self.at("-", "inf", "nan"):
            return self._number()
        if self.accept("true"):
            return ex.const(True, DType.BOOL)
        if self.accept("false"):
            return ex.const(False, DType.BOOL)
        if self.accept("("):
            inner = self.operand()
            self.expect(")")
            return inner
        following = self.peek(1)
        if token.kind == "name" and following.kind == "sign" and following.text == "(":
            return self._call()
        name = self.name("an expression")
        if self.at("["):
            if name not in self.buffers:
                self.fail("the name of a buffer defined earlier", token)
            index, bind = self.position()
            return ex.load(name, index, self.buffers[name], bind)
        if name not in self.scalars:
            self.fail("the name of a scalar defined earlier, or '[' after the name of a buffer", token)
        return self.scalars[name]

    def _number(self) -> ex.Expr:
        negative = self.accept("-")
        token = self.next()
        if token.kind == "int":
            value: int | float = int(token.text)
        elif token.kind == "float" or token.text in ("inf", "nan"):
            value = float(token.text)
        else:
            self.fail("a number", token)
        self.expect(":")
        dtype = self.dtype()
        if dtype is DType.BOOL or (dtype.is_int and not isinstance(value, int)):
            self.fail(f"a {dtype.value} value", token)
        return ex.const(-value if negative else value, dtype)

    def _call(self) -> ex.Expr:
        token = self.next()
        self.expect("(")
        base, _, suffix = token.text.rpartition("_")
        name, dtype = token.text, None
        if suffix in _DTYPES and (base == "index" or (base in OPS and OPS[base].result is Result.GIVEN)):
            name, dtype = base, _DTYPES[suffix]
        if name == "index":
            expr = read_index(self)
            bind = self._bind()
            self.expect(")")
            return ex.index(expr, dtype or DType.I64, bind)
        args = [] if self.at(")") else [self.operand()]
        while self.accept(","):
            args.append(self.operand())
        self.expect(")")
        try:
            return ex.masked(*args) if name == "masked" and len(args) == 3 else ex.op(name, *args, dtype=dtype)
        except ValueError as error:
            self.fail(f"a scalar operation ({error})", token)


def parse_expr(
    text: str, buffers: Mapping[str, DType | Value] | None = None, scalars: Mapping[str, DType] | None = None
) -> ex.Expr:
    """The expression ``text`` stands for.

    Args:
        buffers: every buffer it loads, as a value or by its dtype.
        scalars: dtype of every ``Local`` in it.

    Raises:
        ParseError: with line, column and what was expected.
    """
    reader = ExprReader(text)
    reader.buffers = {n: v.dtype if isinstance(v, Value) else v for n, v in (buffers or {}).items()}
    reader.scalars = {n: ex.local(n, d) for n, d in (scalars or {}).items()}
    found = reader.expr()
    reader.end()
    return found


__all__ = [
    "DEEPEST_NESTING", "ExprReader", "parse_expr", "print_bind", "print_expr", "print_exprs",
    "print_position",
]  # fmt: skip
