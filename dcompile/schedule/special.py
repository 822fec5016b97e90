"""Reductions and scans of nothing and of one element: loops without a fold."""

from __future__ import annotations

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.combine import neutral
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Axis, Node, Pointwise, Reduction, Scan
from dcompile.ir.ops import ARG_REDUCTIONS, WELFORD
from dcompile.ir.types import Value


def drop_trivial_folds(graph: Graph, ctx: Context | None = None) -> Graph:
    """A reduction of nothing is its neutral element in the dtype of the result, one of a single element, like a scan
    over a single position, is that element."""
    if not any(_is_trivial(node) for node in graph.nodes):
        return graph
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Reduction) and _is_trivial(node):
            nodes += _reduction(node)
        elif isinstance(node, Scan) and _is_trivial(node):
            pairs = zip(node.outs, node.exprs, strict=True)
            nodes += [_loop(node, out, node.axes, e) for out, e in pairs]
        else:
            nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _is_trivial(node: Node) -> bool:
    if isinstance(node, Reduction):
        return any(size == 0 for _, size in node.raxes) or all(size == 1 for _, size in node.raxes)
    return isinstance(node, Scan) and dict(node.axes)[node.along] in (0, 1)


def _loop(node: Node, out: Value, axes: tuple[Axis, ...], value: ex.Expr) -> Pointwise:
    return Pointwise(out=out, axes=axes, expr=ex.to(value, out.dtype), origin=node.origin)


def _reduction(node: Reduction) -> list[Node]:
    values = _nothing(node) if any(size == 0 for _, size in node.raxes) else _one(node)
    outs = (node.out, *node.more)
    return [_loop(node, out, node.axes, value) for out, value in zip(outs, values, strict=True)]


def _nothing(node: Reduction) -> tuple[ex.Expr, ...]:
    if node.kind in ARG_REDUCTIONS:
        return (ex.const(0, node.out.dtype),)
    return neutral(node.kind, node.expr.dtype)


def _one(node: Reduction) -> tuple[ex.Expr, ...]:
    zero = {var: sympy.Integer(0) for var, _ in node.raxes}
    exprs = tuple(ex.substitute(e, zero) for e in node.exprs)
    if node.kind in ARG_REDUCTIONS:
        return (ex.const(0, node.out.dtype),)
    if node.kind in WELFORD and len(exprs) == 1:  # the squared distance of an infinite element is NaN
        return exprs[0], ex.op("sub", exprs[0], exprs[0]), ex.const(1, exprs[0].dtype)
    return exprs
