"""Reductions of rows and of columns of the same elements in one kernel, so that these are read once.

The gradient of a normalisation's input reduces rows, the gradients of its weight and bias reduce columns, all of the
same two tensors. The rows are cut into strips, as many as fill the GPU. A program takes the rows of its strip one after
the other, whole rows in registers, and adds each to one running value a column; a second small kernel reduces the
running values of all strips. Loops without reductions of rows run the same way beside the sums of their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy

from dcompile.analyse.context import Context
from dcompile.analyse.dependence import predecessors
from dcompile.ir import expr as ex
from dcompile.ir.combine import bound_to, neutral, rule
from dcompile.ir.graph import Graph
from dcompile.ir.index import product
from dcompile.ir.kernel import Nest, Role, Scratch, Stmt, Write
from dcompile.ir.nodes import Loop, Pointwise, Reduction
from dcompile.schedule.group import Group, Member
from dcompile.schedule.loops import Domain, coefficient

KINDS = frozenset({"sum", "prod", "max", "min"})
"""Reductions of columns that go on element by element."""

STRIPS_EACH = 4
"""Strips for each multiprocessor: as many programs of 8 warps and 64 registers a thread as are resident, whole waves of
fewer, larger ones."""

LEAST_ROWS = 8
"""Rows of a strip: the running values of fewer are as many bytes as the rows."""

WIDE, MOST_MORE, ROWS_OF_MORE = 2048, 8, 32
"""Rows shorter than this keep a program of fewer warps busy: there are more strips then, up to so many times, but none
shorter than so many rows."""

MOST_HELD, LONGEST_HELD = 16384, 8192
"""Most running values of one program beside reductions of rows, 32 f32 in each of 512 threads, and of one column each:
beyond, registers spill."""


def strips_of(rows: int, columns: int, multiprocessors: int) -> int | None:
    """Number of strips of equal length that ``rows`` are cut into; None if they would be too few or too short."""
    wanted = STRIPS_EACH * multiprocessors
    wanted = min(wanted * max(1, min(WIDE // columns, MOST_MORE)), max(wanted, rows // ROWS_OF_MORE))
    counts = [n for n in range(multiprocessors, 2 * wanted + 1) if rows % n == 0 and rows // n >= LEAST_ROWS]
    return min(counts, key=lambda n: (abs(n - wanted), n), default=None)


class StripFinder:
    """Finds the reductions of columns of a LOOPS graph that belong into strips."""

    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.graph, self.ctx = graph, ctx
        self._ancestors: list[int] | None = None

    def strips(self, node: Reduction, parts: int, multiprocessors: int) -> int | None:
        """Number of strips for ``node``, which would otherwise be cut into ``parts``; None if strips save nothing."""
        columns, rows = (product(tuple(size for _, size in axes)) for axes in (node.axes, node.raxes))
        if node.kind not in KINDS or not isinstance(columns, int) or not isinstance(rows, int) or columns <= 1:
            return None
        count = strips_of(rows, columns, multiprocessors)
        if count is None:
            return None
        saved = self._shared_bytes(node, rows, columns)
        more = 2 * (count - parts) * columns * node.expr.dtype.itemsize
        if saved == 0:
            return None
        if saved <= more:
            why = f"{more} bytes of running values would save {saved} bytes"
            self.ctx.verdict("strips", node.out.name, "not in strips", why)
            return None
        self.ctx.verdict("strips", node.out.name, f"{count} strips", f"reads {saved} bytes together with another loop")
        return count

    def _shared_bytes(self, node: Reduction, rows: int, columns: int) -> int:
        """Bytes of the operands of ``node`` that a loop over the same rows reads or makes, which may run beside it."""
        position = self.graph.producer[node.out.name]
        saved = 0
        for name in node.operands:
            value = self.graph.value(name)
            if value.numel != rows * columns:
                continue
            maker = self.graph.producer.get(name)
            beside = [*self.graph.users[name], *([maker] if maker is not None else [])]
            if any(other != position and self._partner(other, position, rows, columns) for other in beside):
                saved += rows * columns * value.dtype.itemsize
        return saved

    def _partner(self, other: int, position: int, rows: int, columns: int) -> bool:
        """Whether node ``other`` runs over the rows and no third node must run between it and ``position``."""
        node = self.graph.nodes[other]
        if not isinstance(node, Pointwise | Reduction) or self._needs(other, position) or self._late(other, position):
            return False
        total = product(tuple(size for _, size in node.axes))
        if isinstance(node, Pointwise):
            return total == rows * columns
        reduced = product(tuple(size for _, size in node.raxes))
        return total == rows and reduced == columns

    def _needs(self, later: int, earlier: int) -> bool:
        """Whether ``later`` depends on ``earlier``."""
        if self._ancestors is None:
            self._ancestors = []
            for before in predecessors(self.graph):
                bits = 0
                for p in before:
                    bits |= self._ancestors[p] | 1 << p
                self._ancestors.append(bits)
        return bool(self._ancestors[later] >> earlier & 1)

    def _late(self, other: int, position: int) -> bool:
        """Whether something that is no loop lies on a path from ``other`` to ``position``."""
        if not self._needs(position, other):
            return False
        assert self._ancestors is not None
        return any(
            self._needs(position, third) and self._needs(third, other) and not isinstance(self.graph.nodes[third], Loop)
            for third in range(other + 1, position)
        )


Maker = Callable[[Member, Domain], Member | None]
"""A member again in another domain; None if it has no place there."""


def strip_group(rows: Group, columns: Group, again: Maker) -> Group | None:
    """Both groups as one in strips, or None if their iterations do not line up or a program could not hold them.

    Args:
        rows: over rows, with or without reductions of them, or in strips already.
        columns: first stages of reductions of columns, one part a strip.
    """
    if rows.column or not columns.column or columns.strips or not columns.domain.inner:
        return None
    if any(m.spread != "fold" or _kind(m) not in KINDS for m in columns.members):
        return None
    strips, *across = columns.domain.outer
    length = product(columns.domain.inner)
    inner = rows.domain.inner or tuple(across)
    if not across or not isinstance(strips, int) or not isinstance(length, int):
        return None
    if product(tuple(across)) != product(inner) or product(rows.domain.outer + rows.domain.inner) != product(
        (strips, length, *inner)
    ):
        return None
    domain = Domain((strips, length), inner)
    placed = [again(m, domain) for m in rows.members]
    placed += [_strip_member(m, domain, again) for m in columns.members]
    members = tuple(sorted((m for m in placed if m is not None), key=lambda m: m.position))
    if len(members) < len(placed) or not all(isinstance(n, int) for n in inner):
        return None
    width = int(product(inner))
    held = sum(m.spread == "strip" for m in members) * width
    if any(m.spread == "fold" for m in members) and (held > MOST_HELD or width > LONGEST_HELD):
        return None
    return Group(domain, False, members, strips=True) if _runs_along_rows(members, domain) else None


def _strip_member(member: Member, domain: Domain, again: Maker) -> Member | None:
    return again(replace(member, spread="strip"), domain)


def _runs_along_rows(members: tuple[Member, ...], domain: Domain) -> bool:
    """Whether no access strides through memory along the last inner axis."""
    last = domain.inner_axes[-1][0]
    for m in members:
        parts = [m.placed.address, *(load.index[0] for load in m.loads())]
        steps = [coefficient(part, last) for part in parts]
        if any(step is not None and step.is_Integer and abs(int(step)) > 1 for step in steps):
            return False
    return True


def in_strips(group: Group, row: tuple[Stmt, ...], roles: tuple[Role, ...], position: sympy.Expr) -> Nest:
    """``row`` for the rows of each strip in order, and around it what becomes of the columns.

    Args:
        roles: of a nest over inner positions.
        position: the flat inner position.
    """
    columns = [m for m in group.members if m.spread == "strip"]
    inner, size = group.domain.inner_axes, product(group.domain.inner)
    assert isinstance(size, int)
    start = tuple(Write(_carried(m), position, neutral(_kind(m), m.out.dtype)[0]) for m in columns)
    ends = tuple(Write(m.name, m.placed.address, ex.load(_carried(m), (position,), m.out.dtype)) for m in columns)
    strips, *rows = group.domain.outer_axes
    body: tuple[Stmt, ...] = (
        *(Scratch(_carried(m), m.out.dtype, size) for m in columns),
        Nest(inner, roles, start),
        Nest(tuple(rows), (Role.SERIAL,) * len(rows), row),
        Nest(inner, roles, ends),
    )
    return Nest((strips,), (Role.PARALLEL,), body)


def continued(member: Member, value: ex.Expr, position: sympy.Expr) -> Write:
    """The reduction of a column takes in ``value``, the element of this row."""
    before = ex.load(_carried(member), (position,), member.out.dtype)
    (after,) = bound_to(rule(_kind(member), member.out.dtype), (before,), (value,))
    return Write(_carried(member), position, after)


def _carried(member: Member) -> str:
    """The scratch memory in which a reduction of columns goes on from row to row."""
    return f"{member.name}_strip"


def _kind(member: Member) -> str:
    node = member.placed.form.node
    assert isinstance(node, Reduction)
    return node.kind
