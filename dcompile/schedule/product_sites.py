"""Where collectives and matrix products meet: gathers that feed products, products that are reduced and scattered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy

from dcompile.collectives.nodes import Kind, Start
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import FloorDiv, Mod, Ranges, flatten_index, simplify, symbol
from dcompile.ir.nodes import Axis, Extern, Pointwise, Ref, View
from dcompile.ir.types import Value, contiguous_stride

PRODUCTS = {"aten.mm.default": 0, "aten.addmm.default": 1, "aten.bmm.default": 0}
"""Library products and the position of their first factor."""


@dataclass(frozen=True)
class Site:
    """A collective and the products beside it.

    Attributes:
        start, wait: positions of its ends.
        products: positions of the products, in program order.
        moved: position of the copy between the gather and its products, or between the product and its reduction; None
            if there is none.
        steps: for a reduction, the position in the product (flat) that each element of the source comes from, over
            ``WHO``, ``ROW`` and the further dimensions of the source (``i1``, ...); None if it is the same one.
    """

    start: int
    wait: int
    products: tuple[int, ...]
    moved: int | None = None
    steps: sympy.Expr | None = None


WHO, ROW = symbol("who"), symbol("row")
"""The rank that sends or receives a row, and its number among the rows of this rank."""


def product_sites(graph: Graph) -> Iterator[Site]:
    """Every collective of ``graph`` that could be cut with its products, in program order; no product twice."""
    taken: set[int] = set()
    for position, node in enumerate(graph.nodes):
        if not isinstance(node, Start) or len(node.sources) != 1 or node.pending.in_place or node.group.size < 2:
            continue
        wait = graph.users[node.pending.name][0]
        values = (graph.value(node.sources[0]), node.pending.results[0])
        if not all(_plain(value) and len(value.shape) > 1 for value in values):
            continue
        found = None
        if node.kind is Kind.ALL_GATHER:
            found = _gathered(graph, position, wait)
        elif node.kind is Kind.REDUCE_SCATTER:
            found = _scattered(graph, position, wait)
        if found is not None and not taken & set(found.products):
            taken.update(found.products)
            yield found


def _plain(value: Value) -> bool:
    """Static sizes, row-major, not empty."""
    sizes = (*value.shape, *value.stride)
    return (
        all(isinstance(n, int) for n in sizes) and value.stride == contiguous_stride(value.shape) and value.numel != 0
    )


def _gathered(graph: Graph, position: int, wait: int) -> Site | None:
    """A gather whose result is the first factor of products, as it is or after one copy that moves rows."""
    start = graph.nodes[position]
    assert isinstance(start, Start)
    gathered, rows = start.pending.results[0], int(graph.value(start.sources[0]).shape[0])
    direct = _products_of(graph, gathered)
    if direct:
        return Site(position, wait, direct)
    for user in graph.users[gathered.name]:
        node = graph.nodes[user]
        if not isinstance(node, Pointwise) or not isinstance(node.expr, ex.Load) or node.expr.bind:
            continue
        ranges = dict(node.axes)
        row = simplify(Mod(node.expr.index[0], sympy.Integer(rows)), ranges)
        who = simplify(FloorDiv(node.expr.index[0], sympy.Integer(rows)), ranges)
        first, extent = node.axes[0]
        alike = node.expr.dtype is node.out.dtype and _plain(node.out) and extent == rows
        if not alike or row != first or who.has(first) or any(at.has(first) for at in node.expr.index[1:]):
            continue
        if products := _products_of(graph, node.out):
            return Site(position, wait, products, moved=user)
    return None


def _products_of(graph: Graph, value: Value) -> tuple[int, ...]:
    """Products whose first factor is ``value``, seen in another shape."""
    found: list[int] = []
    for user in graph.users[value.name]:
        node = graph.nodes[user]
        if isinstance(node, View) and _reshapes(node, value):
            found += [at for at in graph.users[node.out.name] if _first_factor(graph, at) == node.out.name]
        elif _first_factor(graph, user) == value.name:
            found.append(user)
    return tuple(sorted(set(found)))


def _first_factor(graph: Graph, position: int) -> str | None:
    """The name of the first factor of a product that can be cut by rows."""
    node = graph.nodes[position]
    if not isinstance(node, Extern) or node.op not in PRODUCTS or node.writes or node.kwargs or node.outs[0] is None:
        return None
    at = PRODUCTS[node.op]
    if at == 1 and not (isinstance(node.args[0], Ref) and len(graph.value(node.args[0].name).shape) == 1):
        return None
    first, second = node.args[at], node.args[at + 1]
    if not isinstance(first, Ref) or not isinstance(second, Ref) or first == second or not _plain(node.outs[0]):
        return None
    return first.name


def _reshapes(view: View, base: Value) -> bool:
    """Whether ``view`` is all of ``base`` in another shape."""
    if not _plain(view.out) or view.out.numel != base.numel:
        return False
    variables = tuple(var for var, _ in view.axes)
    there, here = flatten_index(view.index, base.stride), flatten_index(variables, view.out.stride)
    return bool(simplify(there - here, dict(view.axes)) == 0)


def _scattered(graph: Graph, position: int, wait: int) -> Site | None:
    """A reduction of a product, as it is or after copies and views that move rows."""
    start = graph.nodes[position]
    assert isinstance(start, Start)
    source, rows = graph.value(start.sources[0]), int(start.pending.results[0].shape[0])
    if start.reduction not in ("sum", "avg"):
        return None
    rest = tuple(symbol(f"i{n}") for n in range(1, len(source.shape)))
    index: tuple[sympy.Expr, ...] = (WHO * rows + ROW, *rest)
    ranges: Ranges = {WHO: start.group.size, ROW: rows, **dict(zip(rest, source.shape[1:], strict=True))}
    name = source.name
    while name in graph.producer:
        at = graph.producer[name]
        node = graph.nodes[at]
        if isinstance(node, View):
            index, name = _through(node.index, node.axes, index, ranges), node.base
        elif isinstance(node, Pointwise) and isinstance(node.expr, ex.Load) and not node.expr.bind:
            if node.expr.dtype is not node.out.dtype:
                return None
            index, name = _through(node.expr.index, node.axes, index, ranges), node.expr.buffer
        elif _first_factor(graph, at) is not None:
            steps = simplify(flatten_index(index, graph.value(name).stride), ranges)
            return _cuttable(Site(position, wait, (at,), None, steps), source, graph.value(name), ranges)
        else:
            return None
    return None


def _through(
    inner: tuple[sympy.Expr, ...], axes: tuple[Axis, ...], at: tuple[sympy.Expr, ...], ranges: Ranges
) -> tuple[sympy.Expr, ...]:
    mapping = {var: where for (var, _), where in zip(axes, at, strict=True)}
    return tuple(simplify(entry.xreplace(mapping), ranges) for entry in inner)


def _cuttable(site: Site, source: Value, product: Value, ranges: Ranges) -> Site | None:
    """``site`` if rows of one number come from one block of the product, or all elements lie there where they go."""
    assert site.steps is not None
    rows, who = int(ranges[ROW]), int(ranges[WHO])
    each = int(product.numel) // rows
    if simplify(FloorDiv(site.steps, sympy.Integer(each)), ranges) == ROW:
        return site
    rest = tuple(symbol(f"i{n}") for n in range(1, len(source.shape)))
    same = flatten_index((WHO * rows + ROW, *rest), contiguous_stride(source.shape))
    return replace(site, steps=None) if simplify(site.steps - same, ranges) == 0 and who > 1 else None
