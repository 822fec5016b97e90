"""Cleaning a LOOPS graph: loads look through views, equal nodes become one, copies of copies and dead nodes go."""

from __future__ import annotations

from dataclasses import replace

import sympy

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import FloorDiv, Mod, Ranges, simplify
from dcompile.ir.nodes import Extern, Loop, Node, Pointwise, Reduction, Scan, Store, View, loop_axes
from dcompile.ir.symbolic import learned, symbols_of
from dcompile.ir.types import Value, contiguous_stride
from dcompile.schedule.special import drop_trivial_folds


def simplify_graph(graph: Graph, ctx: Context) -> Graph:
    """All of this module, in an order in which one run is enough."""
    for step in (drop_trivial_folds, see_through_views, merge_equal, drop_copies, drop_dead, detach_overlapping_stores):
        graph = step(graph, ctx)
    return graph


def see_through_views(graph: Graph, ctx: Context) -> Graph:
    """Loads of a view become loads of what it views, and views of views become views of the first base."""
    views: dict[str, View] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, View):
            base = views.get(node.base)
            if base is not None:
                index = compose(base, node.index, dict(node.axes))
                node = replace(node, base=base.base, index=index, origin=node.origin | base.origin)
            views[node.out.name] = node
        elif isinstance(node, Loop) and any(name in views for name in node.operands):
            node = _load_through(node, views)
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def compose(view: View, position: tuple[sympy.Expr, ...], ranges: Ranges) -> tuple[sympy.Expr, ...]:
    """The position in ``view.base`` of the view's element at ``position``."""
    mapping = {var: at for (var, _), at in zip(view.axes, position, strict=True)}
    return tuple(_short(entry.xreplace(mapping), ranges) for entry in view.index)


def _short(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    return simplify(expr, ranges) if expr.has(FloorDiv, Mod) else expr


def _load_through(node: Loop, views: dict[str, View]) -> Node:
    ranges = dict(loop_axes(node))

    def leaf(item: ex.Expr) -> ex.Expr | None:
        if not isinstance(item, ex.Load) or item.buffer not in views:
            return None
        view = views[item.buffer]
        return ex.load(view.base, compose(view, item.index, ranges), item.dtype, item.bind)

    return node.map(lambda e: ex.transform(e, leaf))


def merge_equal(graph: Graph, ctx: Context) -> Graph:
    """Nodes that compute the same from the same become one, unless something writes into either result or both are
    returned. A storage that was written in between, under whatever name, is not the same any more."""
    roots = storage_roots(graph)
    mutated = {name for node in graph.nodes for name in node.mutates}
    own_memory = {roots[name] for name in mutated | graph.output_names}
    writes: dict[str, int] = {}
    seen: dict[tuple[object, ...], tuple[Value, ...]] = {}
    names: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = node.rename(names) if any(name in names for name in node.operands) else node
        if isinstance(node, Pointwise | Reduction | Scan | View):
            memory = mutated | graph.output_names if isinstance(node, View) else own_memory
            if not any(value.name in memory for value in node.defs):
                state = tuple(writes.get(roots[name], 0) for name in node.operands)
                own = node.defs
                first = seen.setdefault((*_value_key(node), state), own)
                if first is not own:
                    names.update((mine.name, same.name) for mine, same in zip(own, first, strict=True))
                    continue
        for root in {roots[name] for name in node.mutates}:
            writes[root] = writes.get(root, 0) + 1
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _value_key(node: Pointwise | Reduction | Scan | View) -> tuple[object, ...]:
    out = tuple((value.dtype, value.shape, value.stride, value.device) for value in node.defs)
    if isinstance(node, View):
        return (View, out, node.base, node.axes, node.index)
    if isinstance(node, Pointwise):
        return (Pointwise, out, node.axes, node.expr)
    if isinstance(node, Scan):
        return (Scan, out, node.axes, node.along, node.exprs, node.combine, node.start)
    return (Reduction, out, node.kind, node.axes, node.raxes, node.exprs)


def is_copy_of(node: Node) -> str | None:
    """The buffer that a Pointwise repeats element by element at the same positions, or None."""
    if not isinstance(node, Pointwise) or not isinstance(node.expr, ex.Load):
        return None
    same = len(node.expr.index) == len(node.axes) and all(
        at == var or (size == 1 and at == 0) for at, (var, size) in zip(node.expr.index, node.axes, strict=True)
    )
    return node.expr.buffer if same else None


def drop_copies(graph: Graph, ctx: Context) -> Graph:
    """A copy is the original, if layout and dtype agree, nobody writes into the copy's storage, nobody writes into the
    original's after the copy was taken, and the caller does not get the copy or a view of it."""
    roots = storage_roots(graph)
    last_write = {roots[name]: at for at, node in enumerate(graph.nodes) for name in node.mutates}
    returned = {roots[name] for name in graph.output_names}
    names: dict[str, str] = {}
    nodes: list[Node] = []
    for at, node in enumerate(graph.nodes):
        node = node.rename(names) if any(name in names for name in node.operands) else node
        source = is_copy_of(node)
        if isinstance(node, Pointwise) and source is not None and node.out.name not in returned:
            original, copy = graph.value(source), node.out
            alike = (original.shape, original.stride, original.dtype, original.device) == (
                copy.shape,
                copy.stride,
                copy.dtype,
                copy.device,
            )
            if alike and copy.name not in last_write and last_write.get(roots[source], -1) < at:
                names[copy.name] = source
                continue
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def drop_dead(graph: Graph, ctx: Context) -> Graph:
    """``without_dead`` as a pass."""
    return without_dead(graph)


def without_dead(graph: Graph) -> Graph:
    """Nodes without effect whose results nobody reads are removed."""
    live = set(graph.output_names)
    numbers = learned(graph)
    live.update(s.name for out in graph.outputs if isinstance(out, sympy.Expr) for s in out.free_symbols)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.has_effect or any(d.name in live for d in node.defs):
            live.update(node.operands)
            if numbers:
                live.update(s.name for s in symbols_of(node))
            kept.append(_without_unread(node, live))
    return graph.with_nodes(tuple(reversed(kept)))


def _without_unread(node: Node, live: set[str]) -> Node:
    """A library call without those of its several results that nobody reads: they may not even be tensors."""
    if not isinstance(node, Extern) or node.out_op is not None or node.binds or not node.seq:
        return node
    outs = tuple(out if out is None or out.name in live else None for out in node.outs)
    return node if outs == node.outs else replace(node, outs=outs)


def reads_elsewhere(store: Store, roots: dict[str, str]) -> bool:
    """Whether ``store`` reads its target's storage at positions that it may write at another iteration."""
    target = roots[store.target]
    own = [
        load
        for root in (store.expr, *store.bind)
        for load in ex.loads(root)
        if roots.get(load.buffer, load.buffer) == target
    ]
    if not own:
        return False
    if any(load.buffer != store.target or load.bind or load.index != store.index for load in own):
        return True
    return any(size != 1 and not _has_own_place(var, store) for var, size in store.axes)


def _has_own_place(var: sympy.Symbol, store: Store) -> bool:
    """Whether some entry of the index moves with this axis alone, so that no position is written twice along it."""
    others = {other for other, _ in store.axes if other != var}
    moved = (at for at in store.index if var in at.free_symbols and not at.free_symbols & others)
    return any(at.is_polynomial(var) for at in moved)


def detach_overlapping_stores(graph: Graph, ctx: Context) -> Graph:
    """A store that reads its own target elsewhere (``x.copy_(x.t())``) first computes all it stores, then stores it."""
    if not any(isinstance(node, Store) for node in graph.nodes):
        return graph
    roots = storage_roots(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Store) and reads_elsewhere(node, roots):
            shape = tuple(size for _, size in node.axes)
            value = Value(f"{node.out.name}_new", node.expr.dtype, shape, contiguous_stride(shape), node.out.device)
            nodes.append(Pointwise(out=value, axes=node.axes, expr=node.expr, origin=node.origin))
            position = tuple(var for var, _ in node.axes)
            node = replace(node, expr=ex.load(value.name, position, value.dtype))
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))
