"""Sums along an axis of which one position differs from all others: two values instead of a loop.

The gradient of a cross entropy sums ``-1 at the label, 0 elsewhere`` over all classes. Once that choice has been
inlined into the sum, its body takes one value where the position meets the label and another everywhere else.
"""

from __future__ import annotations

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Node, Pointwise, Reduction
from dcompile.ir.types import DType, Size
from dcompile.schedule.loops import index_parts


def close_one_hot_sums(graph: Graph, ctx: Context) -> Graph:
    """Replace every such sum by the one value and the product of the other with its count."""
    closed: dict[int, Node] = {}
    for at, node in enumerate(graph.nodes):
        if isinstance(node, Reduction) and (value := _closed(node)) is not None:
            ctx.verdict("fuse", node.out.name, "no loop", "one position differs from all others")
            body = ex.to(value, node.out.dtype)
            closed[at] = Pointwise(out=node.out, axes=node.axes, expr=body, origin=node.origin)
    if not closed:
        return graph
    return graph.with_nodes(tuple(closed.get(at, node) for at, node in enumerate(graph.nodes)))


def _closed(node: Reduction) -> ex.Expr | None:
    """The sum without a loop; None if its body has more than two values."""
    if node.kind != "sum" or len(node.raxes) != 1 or node.more:
        return None
    var, size = node.raxes[0]
    if not isinstance(size, int) or size < 2 or node.expr.dtype is DType.BOOL:
        return None
    tests = {part: place for part in ex.walk(node.expr) if (place := _place(part, var)) is not None}
    if len(tests) != 1:
        return None
    ((test, place),) = tests.items()
    hit, miss = (_decided(node.expr, test, answer) for answer in (True, False))
    if any(var in part.free_symbols for root in (hit, miss, place) for part in index_parts(root)):
        return None
    return _total(hit, miss, place, size)


def _place(part: ex.Expr, var: sympy.Symbol) -> ex.Expr | None:
    """Where ``part`` is true along ``var``, if it compares the position with something."""
    if not isinstance(part, ex.Op) or part.name != "eq":
        return None
    for position, place in (part.args, part.args[::-1]):
        if isinstance(position, ex.Index) and position.expr == var and not position.bind:
            return place
    return None


def _decided(root: ex.Expr, test: ex.Expr, answer: bool) -> ex.Expr:
    """``root`` where ``test`` has this answer."""
    true, false = ex.const(True, DType.BOOL), ex.const(False, DType.BOOL)

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if node == test:
            return true if answer else false
        if not isinstance(node, ex.Op):
            return None
        if node.name == "where" and isinstance(node.args[0], ex.Const):
            return node.args[1] if node.args[0].value else node.args[2]
        if node.name == "and" and false in node.args:
            return false
        if node.name == "and" and true in node.args:
            return node.args[1] if node.args[0] == true else node.args[0]
        return None

    return ex.transform(root, leaf)


def _total(hit: ex.Expr, miss: ex.Expr, place: ex.Expr, size: Size) -> ex.Expr:
    """One hit and ``size - 1`` misses, or misses only where ``place`` is out of range."""
    assert isinstance(size, int)

    def misses(count: int) -> ex.Expr:
        return ex.op("mul", miss, ex.const(count, miss.dtype))

    nothing = isinstance(miss, ex.Const) and miss.value == 0
    total = hit if nothing else ex.op("add", hit, misses(size - 1))
    if isinstance(place, ex.Op) and place.name == "wrap_index" and place.args[1] == ex.const(size, DType.I64):
        return total
    inside = ex.op("and", ex.op("ge", place, ex.const(0, place.dtype)), ex.op("lt", place, ex.const(size, place.dtype)))
    return ex.op("where", inside, total, miss if nothing else misses(size))
