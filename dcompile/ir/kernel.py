"""Fused kernels: the loop nests that printers print word for word. Every decision has been taken when these exist.

Grammar::

    kernel = kernel outs(values) { stmt... }
    stmt   = nest (axes: role) { stmt... }       # loops, outermost first
           | let name = expr                     # a scalar, visible until the end of the enclosing nest
           | fold (axes: role) name = kind expr  # reductions side by side over the same axes; names visible afterwards
           | scan (axis) name = expr by rule     # running folds along one axis; names visible in its writes only;
                                                 # perhaps in tiles that tell each other what they come to
           | write mode buffer[address] = expr   # address in elements from the buffer's first element
           | scratch name[size]                  # memory private to one iteration of the enclosing nest

Roles: ``parallel`` iterations are independent and may run on different threads; ``serial`` run in order;
``simd`` iterations are independent and run in lanes. A ``simd`` nest that contains a ``fold`` or a nested nest is
executed in strips: every statement runs for all lanes of a strip before the next statement begins, and its locals are
one value per lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TypeAlias

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.nodes import Axis, Node, rename_loads
from dcompile.ir.ops import ARG_REDUCTIONS, PRODUCTS
from dcompile.ir.types import DType, Size, Value


class Role(Enum):
    PARALLEL = "parallel"
    SERIAL = "serial"
    SIMD = "simd"


@dataclass(frozen=True)
class Nest:
    """Loops over ``axes``, outermost first, each with its role, around ``body``."""

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class Let:
    name: str
    expr: ex.Expr


@dataclass(frozen=True)
class Accumulator:
    """One reduction of a Fold: ``name = fold kind of expr``; kind is one of ``ops.REDUCTIONS``, the accumulator has
    ``expr.dtype`` (i64 for arg kinds, whose position counts the fold's axes row-major). ``more`` are the names of the
    further results and ``others`` the further operands of kinds that have them. Kinds ``ops.PRODUCTS`` have two
    operands and accumulate in their compute type: the nest around is a matrix product."""

    name: str
    kind: str
    expr: ex.Expr
    more: tuple[str, ...] = ()
    others: tuple[ex.Expr, ...] = ()

    @property
    def dtype(self) -> DType:
        if self.kind in PRODUCTS:
            return self.expr.dtype.compute
        return DType.I64 if self.kind in ARG_REDUCTIONS else self.expr.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """All results, ``name`` first."""
        return (self.name, *self.more)

    @property
    def exprs(self) -> tuple[ex.Expr, ...]:
        """All operands, ``expr`` first."""
        return (self.expr, *self.others)

    def map(self, change: Callable[[ex.Expr], ex.Expr]) -> Accumulator:
        """The same accumulator of changed expressions."""
        return replace(self, expr=change(self.expr), others=tuple(change(e) for e in self.others))


@dataclass(frozen=True)
class Fold:
    """Reductions side by side over the same axes. ``lets`` are evaluated first in each iteration and shared by all;
    ``writes`` happen in each iteration, after the lets."""

    axes: tuple[Axis, ...]
    roles: tuple[Role, ...]
    accumulators: tuple[Accumulator, ...]
    lets: tuple[Let, ...] = ()
    writes: tuple[Write, ...] = ()


@dataclass(frozen=True)
class Write:
    """``buffer[address] = expr`` (``set``) or ``+= expr`` (``add``: repeated addresses add up, also across threads).

    ``bind`` as in ``ir.expr``: ``q0..`` inside ``address``.
    """

    buffer: str
    address: sympy.Expr
    expr: ex.Expr
    bind: tuple[ex.Expr, ...] = ()
    mode: str = "set"


@dataclass(frozen=True)
class Tiles:
    """A scan cut into tiles of ``length`` neighbouring positions, which may be worked on side by side.

    ``state`` is an out of the kernel, the next version of words (i64) that are all zero before: where tiles tell those
    behind them what they come to (``ir.tiles``). What it holds afterwards is nobody's business.
    """

    length: int
    state: str


@dataclass(frozen=True)
class ScanLoop:
    """Inclusive scans side by side along ``axis``, in order.

    Each iteration evaluates ``lets``, then gives every name in ``names`` its running value (``combine`` of the value
    before, ``ir.combine.left(k)``, and ``exprs[k]``, ``ir.combine.right(k)``; in the first iteration of ``start[k]``
    and ``exprs[k]``, or ``exprs[k]`` itself if ``start`` is empty), then does ``writes``, which may read the names.
    """

    axis: Axis
    names: tuple[str, ...]
    exprs: tuple[ex.Expr, ...]
    combine: tuple[ex.Expr, ...]
    start: tuple[ex.Const, ...] = ()
    lets: tuple[Let, ...] = ()
    writes: tuple[Write, ...] = ()
    tiles: Tiles | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.axis,)


@dataclass(frozen=True)
class Scratch:
    """Memory of ``size`` elements private to one iteration of the enclosing nest (of the kernel at top level)."""

    name: str
    dtype: DType
    size: int


Stmt: TypeAlias = "Nest | Let | Fold | ScanLoop | Write | Scratch"


@dataclass(frozen=True, kw_only=True)
class Kernel(Node):
    """A fused loop nest.

    Attributes:
        outs: values it writes. Buffers it reads are its ``operands``.
        body: statements.
        targets: for each out the operand it is the next version of (``Store``), or None for a fresh buffer.
        inplace: pairs (out, operand) where the out may take the operand's memory when the operand dies here: each
            iteration reads the operand only at the address it writes, before writing it.
    """

    outs: tuple[Value, ...]
    body: tuple[Stmt, ...]
    targets: tuple[str | None, ...] = ()
    inplace: tuple[tuple[str, str], ...] = ()

    @property
    def defs(self) -> tuple[Value, ...]:
        return self.outs

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        """Targets first, then loaded buffers; values the kernel itself writes or keeps in scratch are not operands."""
        own = {out.name for out in self.outs} | {s.name for s in statements(self.body) if isinstance(s, Scratch)}
        names = [t for t in self.targets if t is not None]
        names += [load.buffer for e in expressions(self.body) for load in ex.loads(e)]
        return tuple(name for name in dict.fromkeys(names) if name not in own)

    @property
    def mutates(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for t in self.targets if t is not None))

    @property
    def has_effect(self) -> bool:
        return bool(self.mutates)

    def rename(self, names: dict[str, str]) -> Kernel:
        return replace(
            self,
            body=tuple(_rename(s, names) for s in self.body),
            targets=tuple(names.get(t, t) if t else t for t in self.targets),
            inplace=tuple((out, names.get(operand, operand)) for out, operand in self.inplace),
        )


def statements(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """All statements, outer before inner, the lets and writes of folds included."""
    for stmt in body:
        yield stmt
        if isinstance(stmt, Nest):
            yield from statements(stmt.body)
        elif isinstance(stmt, Fold | ScanLoop):
            yield from stmt.lets
            yield from stmt.writes


def expressions(body: tuple[Stmt, ...]) -> Iterator[ex.Expr]:
    """All scalar expressions in ``body``."""
    for stmt in statements(body):
        if isinstance(stmt, Let):
            yield stmt.expr
        elif isinstance(stmt, Fold):
            yield from (e for acc in stmt.accumulators for e in acc.exprs)
        elif isinstance(stmt, ScanLoop):
            yield from stmt.exprs
        elif isinstance(stmt, Write):
            yield stmt.expr
            yield from stmt.bind


def bound_axes(write: Write) -> tuple[Axis, ...] | None:
    """The data-dependent parts of a write's address, each with the number of its values; None where that is unknown."""
    found: list[Axis] = []
    for n, part in enumerate(write.bind):
        limit = part.args[1] if isinstance(part, ex.Op) and part.name == "wrap_index" else None
        if not isinstance(limit, ex.Const):
            return None
        found.append((ex.bound(n), int(limit.value)))
    return tuple(found)


def extents(body: tuple[Stmt, ...]) -> dict[sympy.Symbol, Size]:
    """Every loop variable of ``body`` with its extent."""
    found: dict[sympy.Symbol, Size] = {}
    for stmt in statements(body):
        if isinstance(stmt, Nest | Fold | ScanLoop):
            found.update(stmt.axes)
    return found


def _rename(stmt: Stmt, names: dict[str, str]) -> Stmt:
    if isinstance(stmt, Nest):
        return replace(stmt, body=tuple(_rename(s, names) for s in stmt.body))
    if isinstance(stmt, Let):
        return replace(stmt, expr=rename_loads(stmt.expr, names))
    if isinstance(stmt, Fold):
        return replace(
            stmt,
            accumulators=tuple(a.map(lambda e: rename_loads(e, names)) for a in stmt.accumulators),
            lets=tuple(replace(s, expr=rename_loads(s.expr, names)) for s in stmt.lets),
            writes=tuple(_rename_write(w, names) for w in stmt.writes),
        )
    if isinstance(stmt, ScanLoop):
        return replace(
            stmt,
            exprs=tuple(rename_loads(e, names) for e in stmt.exprs),
            lets=tuple(replace(s, expr=rename_loads(s.expr, names)) for s in stmt.lets),
            writes=tuple(_rename_write(w, names) for w in stmt.writes),
        )
    if isinstance(stmt, Write):
        return _rename_write(stmt, names)
    return stmt


def _rename_write(write: Write, names: dict[str, str]) -> Write:
    return replace(
        write,
        buffer=names.get(write.buffer, write.buffer),
        expr=rename_loads(write.expr, names),
        bind=tuple(rename_loads(b, names) for b in write.bind),
    )
