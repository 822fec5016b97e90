"""Where collectives and matrix products meet: gathers that feed products, products that are reduced and scattered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
        steps: for a reduction, the position in each product (flat) that an element of the source comes from, over
            ``WHO``, ``ROW`` and the further dimensions of the source (``i1``, ...); None if it is the same one.
        combined: for a reduction of several products, the element of the source; loads stand for the products' elements
            and have no position.
    """

    start: int
    wait: int
    products: tuple[int, ...]
    moved: int | None = None
    steps: sympy.Expr | None = None
    combined: ex.Expr | None = None


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
    return bool(simplify(_quotients_inside(there - here), dict(view.axes)) == 0)


def _scattered(graph: Graph, position: int, wait: int) -> Site | None:
    """A reduction of a product or of one loop over several, as they are or after copies and views that move rows."""
    start = graph.nodes[position]
    assert isinstance(start, Start)
    source, rows = graph.value(start.sources[0]), int(start.pending.results[0].shape[0])
    if start.reduction not in ("sum", "avg"):
        return None
    rest = tuple(symbol(f"i{n}") for n in range(1, len(source.shape)))
    ranges: Ranges = {WHO: start.group.size, ROW: rows, **dict(zip(rest, source.shape[1:], strict=True))}
    name, index = _moved_from(graph, source.name, (WHO * rows + ROW, *rest), ranges)
    reached = {name: index}
    combined: ex.Expr | None = None
    node = graph.nodes[graph.producer[name]] if name in graph.producer else None
    if isinstance(node, Pointwise):
        loads = ex.loads(node.expr)
        if node.out.dtype is not source.dtype or any(load.bind for load in loads) or _uses_position(node.expr):
            return None
        ends = {
            load: _moved_from(graph, load.buffer, _through(load.index, node.axes, index, ranges), ranges)
            for load in loads
        }
        if len({end[0] for end in ends.values()}) != len(ends):
            return None
        reached = dict(ends.values())
        combined = ex.transform(node.expr, lambda e: ex.load(ends[e][0], (), e.dtype) if e in ends else None)
    found = {_steps(graph, name, index, source, ranges) for name, index in reached.items()}
    products = tuple(sorted(graph.producer.get(name, -1) for name in reached))
    if len(found) != 1 or None in found or any(at < 0 or _first_factor(graph, at) is None for at in products):
        return None
    steps = found.pop()
    return Site(position, wait, products, None, None if steps is SAME else steps, combined)


SAME = symbol("same")
"""The position of an element in a product where it is the one in the source."""


def _uses_position(root: ex.Expr) -> bool:
    return any(isinstance(node, ex.Index) for node in ex.walk(root))


def _moved_from(
    graph: Graph, name: str, index: tuple[sympy.Expr, ...], ranges: Ranges
) -> tuple[str, tuple[sympy.Expr, ...]]:
    """Through views and copies that only move elements: the first value that is neither, and the position in it."""
    while name in graph.producer:
        node = graph.nodes[graph.producer[name]]
        if isinstance(node, View):
            index, name = _through(node.index, node.axes, index, ranges), node.base
        elif isinstance(node, Pointwise) and isinstance(node.expr, ex.Load) and not node.expr.bind:
            if node.expr.dtype is not node.out.dtype:
                break
            index, name = _through(node.expr.index, node.axes, index, ranges), node.expr.buffer
        else:
            break
    return name, index


def _through(
    inner: tuple[sympy.Expr, ...], axes: tuple[Axis, ...], at: tuple[sympy.Expr, ...], ranges: Ranges
) -> tuple[sympy.Expr, ...]:
    mapping = {var: where for (var, _), where in zip(axes, at, strict=True)}
    return tuple(simplify(entry.xreplace(mapping), ranges) for entry in inner)


def _steps(graph: Graph, name: str, index: tuple[sympy.Expr, ...], source: Value, ranges: Ranges) -> sympy.Expr | None:
    """Where in a product (flat) an element of ``source`` comes from, if rows of one number come from one block of the
    product; ``SAME`` if from the same place; else None."""
    product = graph.value(name)
    if not _plain(product) or product.numel != source.numel:
        return None
    steps = simplify(_quotients_inside(flatten_index(index, product.stride)), ranges)
    rows = int(ranges[ROW])
    each = int(product.numel) // rows
    if simplify(FloorDiv(steps, sympy.Integer(each)), ranges) == ROW:
        return steps
    rest = tuple(symbol(f"i{n}") for n in range(1, len(source.shape)))
    same = flatten_index((WHO * rows + ROW, *rest), contiguous_stride(source.shape))
    return SAME if simplify(steps - same, ranges) == 0 else None


def _quotients_inside(expr: sympy.Expr) -> sympy.Expr:
    """``(a % (n*m)) // n`` as ``(a // n) % m``, which sums of digits are recognised by."""
    return expr.replace(
        lambda e: (
            isinstance(e, FloorDiv)
            and isinstance(e.args[0], Mod)
            and e.args[1].is_Integer
            and e.args[0].args[1].is_Integer
            and e.args[0].args[1] % e.args[1] == 0
        ),
        lambda e: Mod(FloorDiv(e.args[0].args[0], e.args[1]), e.args[0].args[1] / e.args[1]),
    )
