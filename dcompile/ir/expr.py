"""Scalar expressions: the body of a loop. Immutable and interned, so equal expressions are the same object.

Grammar::

    expr  = Const value dtype | Index sympy dtype [bind] | Load buffer index [bind] | Local name
          | Op name expr... | Masked cond body other

``bind`` is how a data-dependent position enters an index: inside ``Load.index`` and ``Index.expr`` the symbol ``q0``
stands for the value of ``bind[0]``, ``q1`` for ``bind[1]`` and so on. The symbols are local to that one expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import sympy

from dcompile.ir.index import replaced, symbol
from dcompile.ir.ops import OPS, Result
from dcompile.ir.types import DType


@dataclass(frozen=True, eq=False)
class Expr:
    """Base of all scalar expressions. Build them with the lower-case functions of this module, which intern."""

    dtype: DType

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    @cached_property
    def loads_below(self) -> tuple[Load, ...]:
        """All distinct loads under this expression, itself not counted, operands before users."""
        return tuple(node for node in walk(self) if isinstance(node, Load) and node is not self)


@dataclass(frozen=True, eq=False)
class Const(Expr):
    value: bool | int | float


@dataclass(frozen=True, eq=False)
class Index(Expr):
    """An integer expression of loop variables and sizes, as a value of ``dtype``."""

    expr: sympy.Expr
    bind: tuple[Expr, ...] = ()

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.bind


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """One element of a buffer. ``index`` has one entry per dimension; inside a Kernel it is the single flat address."""

    buffer: str
    index: tuple[sympy.Expr, ...]
    bind: tuple[Expr, ...] = ()

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.bind


@dataclass(frozen=True, eq=False)
class Local(Expr):
    """A scalar defined earlier in the same Kernel by ``Let`` or ``Fold``."""

    name: str


@dataclass(frozen=True, eq=False)
class Op(Expr):
    name: str
    args: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args


@dataclass(frozen=True, eq=False)
class Masked(Expr):
    """``body`` where ``cond`` holds, else ``other``. Where ``cond`` does not hold, ``body`` makes none of its loads."""

    cond: Expr
    body: Expr
    other: Expr

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.cond, self.body, self.other)


_interned: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()
E = TypeVar("E", bound=Expr)


def _intern(key: tuple[Any, ...], make: Callable[[], E]) -> E:
    found = _interned.get(key)
    if found is None:
        found = _interned.setdefault(key, make())
    return cast(E, found)


def const(value: bool | int | float, dtype: DType) -> Const:
    """A literal, converted to ``dtype`` the way C converts (bool: nonzero)."""
    typed: bool | int | float
    if dtype is DType.BOOL:
        typed = bool(value)
    elif dtype.is_int:
        typed = int(value)
    else:
        typed = float(value)
    return _intern(("c", repr(typed), dtype), lambda: Const(dtype, typed))


def index(expr: sympy.Expr | int, dtype: DType = DType.I64, bind: tuple[Expr, ...] = ()) -> Expr:
    """An index expression as a value; a plain integer becomes a literal."""
    expr = sympy.sympify(expr)
    if expr.is_Integer:
        return const(int(expr), dtype)
    expr, bind = _compact((expr,), bind)
    return _intern(("i", expr[0], dtype, bind), lambda: Index(dtype, expr[0], bind))


def load(buffer: str, position: tuple[sympy.Expr | int, ...], dtype: DType, bind: tuple[Expr, ...] = ()) -> Load:
    """The element of ``buffer`` at ``position``."""
    where, bind = _compact(tuple(sympy.sympify(p) for p in position), bind)
    return _intern(("l", buffer, where, dtype, bind), lambda: Load(dtype, buffer, where, bind))


def local(name: str, dtype: DType) -> Local:
    return _intern(("v", name, dtype), lambda: Local(dtype, name))


def op(name: str, *args: Expr, dtype: DType | None = None) -> Expr:
    """Apply a row of ``ops.OPS``.

    Raises:
        ValueError: unknown op, wrong operand count, operands of different dtypes, or a missing result dtype.
    """
    info = OPS.get(name)
    if info is None or len(args) != info.arity:
        raise ValueError(f"no scalar op {name!r} with {len(args)} operands")
    if info.result is Result.GIVEN:
        if dtype is None:
            raise ValueError(f"{name} needs its result dtype")
        result = dtype
    else:
        same = args[1:] if name == "where" else args
        if any(a.dtype is not same[0].dtype for a in same) or (name == "where" and args[0].dtype is not DType.BOOL):
            raise ValueError(f"{name} of mixed dtypes {[a.dtype.value for a in args]}")
        result = DType.BOOL if info.result is Result.BOOL else args[-1].dtype
    return _intern(("o", name, args, result), lambda: Op(result, name, args))


def to(value: Expr, dtype: DType) -> Expr:
    """``value`` converted to ``dtype``; nothing if it already is."""
    if value.dtype is dtype:
        return value
    if isinstance(value, Const) and not (isinstance(value.value, float) and dtype.is_int):
        if dtype not in (DType.F16, DType.BF16, DType.F32):  # literals of narrow floats would need rounding here
            return const(value.value, dtype)
        if value.value in (0, 1) or value.dtype is DType.BOOL:
            return const(value.value, dtype)
    return op("to", value, dtype=dtype)


def masked(cond: Expr, body: Expr, other: Expr) -> Expr:
    """``body`` guarded by ``cond``.

    Raises:
        ValueError: ``cond`` is not bool, or the two branches differ in dtype.
    """
    if cond.dtype is not DType.BOOL or body.dtype is not other.dtype:
        raise ValueError(f"masked({cond.dtype.value}, {body.dtype.value}, {other.dtype.value})")
    if isinstance(cond, Const):
        return body if cond.value else other
    return _intern(("m", cond, body, other), lambda: Masked(body.dtype, cond, body, other))


def bound(n: int) -> sympy.Symbol:
    """The symbol ``q{n}`` that stands for ``bind[n]``."""
    return symbol(f"q{n}")


def _compact(exprs: tuple[sympy.Expr, ...], bind: tuple[Expr, ...]) -> tuple[tuple[sympy.Expr, ...], tuple[Expr, ...]]:
    """Drop unused bindings and merge equal ones, renumbering from q0 in order of first position."""
    if not bind:
        return exprs, ()
    used = set().union(*(e.free_symbols for e in exprs)) if exprs else set()
    keep = tuple(dict.fromkeys(b for n, b in enumerate(bind) if bound(n) in used))
    rename = {bound(n): bound(keep.index(b)) for n, b in enumerate(bind) if bound(n) in used}
    if any(old is not new for old, new in rename.items()):
        exprs = tuple(e.xreplace(rename) for e in exprs)
    return exprs, keep


def walk(root: Expr) -> Iterator[Expr]:
    """Every distinct sub-expression, operands before users."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.children) if child not in seen)


def rebuild(node: Expr, children: tuple[Expr, ...]) -> Expr:
    """``node`` with other operands, re-normalised."""
    if isinstance(node, Op):
        return op(node.name, *children, dtype=node.dtype)
    if isinstance(node, Masked):
        return masked(*children)
    if isinstance(node, Load):
        return load(node.buffer, node.index, node.dtype, children)
    if isinstance(node, Index):
        return index(node.expr, node.dtype, children)
    return node


def transform(root: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild ``root`` bottom up; ``leaf(node)`` gives a replacement for a rebuilt node, or None to keep it."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        fresh = rebuild(node, tuple(done[c] for c in node.children)) if node.children else node
        replaced = leaf(fresh)
        done[node] = fresh if replaced is None else replaced
    return done[root]


def substitute(root: Expr, mapping: Mapping[sympy.Symbol, sympy.Expr], bind: tuple[Expr, ...] = ()) -> Expr:
    """Replace loop variables in every index of ``root``.

    ``mapping`` may use ``q0..`` for the values of ``bind``; they are carried into each index that needs them.
    """

    pairs = tuple((v, sympy.sympify(e)) for v, e in mapping.items())

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load | Index):
            return None
        shift = {bound(n): bound(n + len(node.bind)) for n in range(len(bind))} if bind and node.bind else {}
        here = tuple((v, e.xreplace(shift)) for v, e in pairs) if shift else pairs
        if isinstance(node, Load):
            return load(node.buffer, tuple(replaced(i, here) for i in node.index), node.dtype, node.bind + bind)
        return index(replaced(node.expr, here), node.dtype, node.bind + bind)

    return transform(root, leaf)


def loads(root: Expr) -> tuple[Load, ...]:
    """All distinct loads, including those inside bindings."""
    return (*root.loads_below, root) if isinstance(root, Load) else root.loads_below


def flops(root: Expr) -> int:
    """Rough arithmetic per element, shared sub-expressions counted once."""
    return sum(OPS[node.name].flops for node in walk(root) if isinstance(node, Op))
