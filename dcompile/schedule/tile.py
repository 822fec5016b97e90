"""Square tiles for loops that read some operands along memory and others across it."""

from __future__ import annotations

from dataclasses import replace

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.index import stride_of, symbol
from dcompile.ir.kernel import Let, Nest, Role, Stmt, Write
from dcompile.ir.nodes import Axis

TILE = 32
"""Side of a tile: two cache lines of f32 in one direction, and few enough rows in the other that all their lines stay
in the first-level cache (32 rows of 128 bytes are 4 KiB). On a GPU a block of 1024 positions is one tile."""


def tiled(nest: Nest) -> Nest:
    """``nest`` in tiles over its last axis and another one that some operand runs along, if tiles divide both.

    The body is straight-line and writes each address once, so that the order of iterations does not matter.
    """
    across = _across(nest)
    if across is None or nest.roles[-1] is not Role.SIMD:
        return nest
    last = len(nest.axes) - 1
    tiles = [_cut(nest.axes[at]) for at in (across, last)]
    mapping = {var: outer[0] * TILE + inner[0] for (outer, inner, var) in tiles}
    axes = list(nest.axes)
    axes[across], axes[last] = tiles[0][0], tiles[1][0]
    lead = nest.roles[0] if last else Role.PARALLEL
    roles = (*(lead for _ in axes), Role.SERIAL, Role.SIMD)
    body = tuple(_moved(stmt, mapping) for stmt in nest.body)
    return Nest((*axes, tiles[0][1], tiles[1][1]), roles, body)


def _cut(axis: Axis) -> tuple[Axis, Axis, sympy.Symbol]:
    """An axis as tiles and what is inside one."""
    var, extent = axis
    assert isinstance(extent, int)
    return (symbol(f"{var.name}_tile"), extent // TILE), (symbol(f"{var.name}_in"), TILE), var


def _across(nest: Nest) -> int | None:
    """Position of an axis along which a load runs through memory while the last axis strides."""
    if len(nest.axes) < 2 or not _divides(nest.axes[-1]):
        return None
    last = nest.axes[-1][0]
    for at in reversed(range(len(nest.axes) - 1)):
        var = nest.axes[at][0]
        if _divides(nest.axes[at]) and any(_runs(address, var, last) for address in _addresses(nest)):
            return at
    return None


def _divides(axis: Axis) -> bool:
    return isinstance(axis[1], int) and axis[1] % TILE == 0 and axis[1] >= 2 * TILE


def _runs(address: sympy.Expr, var: sympy.Symbol, last: sympy.Symbol) -> bool:
    step, stride = stride_of(address, var), stride_of(address, last)
    return step == 1 and stride is not None and stride.is_Integer and abs(int(stride)) >= TILE


def _addresses(nest: Nest) -> list[sympy.Expr]:
    roots = [root for s in nest.body for root in ((s.expr,) if isinstance(s, Let | Write) else ())]
    found = [load.index[0] for root in roots for load in ex.loads(root) if not load.bind]
    return found + [s.address for s in nest.body if isinstance(s, Write)]


def _moved(stmt: Stmt, mapping: dict[sympy.Symbol, sympy.Expr]) -> Stmt:
    if isinstance(stmt, Let):
        return replace(stmt, expr=ex.substitute(stmt.expr, mapping))
    assert isinstance(stmt, Write)
    return replace(stmt, address=sympy.expand(stmt.address.xreplace(mapping)), expr=ex.substitute(stmt.expr, mapping))
