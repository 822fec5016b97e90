"""Recompute or store: pointwise producers move into the loops that read them where that is cheaper than memory.

Values that several loops of the same shape read are left alone here: fusion computes those once per element inside one
kernel. What is inlined is what recomputation makes cheaper than a store and its loads, by the cost model's own rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import sympy

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import FloorDiv, Mod, Ranges, simplify
from dcompile.ir.nodes import Loop, Node, Pointwise, Reduction, Store, loop_axes
from dcompile.ir.types import Size
from dcompile.schedule.simplify import drop_dead, reads_elsewhere

MAX_OPS = 256
"""Largest body inlining may build, in scalar operations. Beyond it compilers spill and compile time grows faster than
linearly; chained producers that hit it are stored, which bounds the cost of a chain by its length."""

FLOPS_PER_BYTE = 4
"""Arithmetic that costs as much as moving one byte. A core does 30 to 60 vectorised f32 operations in the time in which
it moves 8 to 12 bytes, so up to 4 operations for each byte saved are worth recomputing."""


def inline_pointwise(graph: Graph, ctx: Context) -> Graph:
    """Inline producers into their readers, in program order, so that chains collapse in one sweep."""
    roots = storage_roots(graph)
    writes = _write_positions(graph, roots)
    nodes = list(graph.nodes)
    producers = {n.out.name: p for p, n in enumerate(nodes) if isinstance(n, Pointwise)}
    for position, node in enumerate(graph.nodes):
        if not isinstance(node, Loop):
            continue
        for name in node.operands:
            source = producers.get(name)
            if source is None:
                continue
            producer = nodes[source]
            assert isinstance(producer, Pointwise)
            reason = _refusal(graph, producer, nodes[position], name)
            if reason is None and _crosses_write(producer, source, position, roots, writes):
                reason = "its inputs or its memory are written in between"
            merged = _inline(nodes[position], producer) if reason is None else nodes[position]
            if reason is None and isinstance(merged, Store) and reads_elsewhere(merged, roots):
                reason = "the store overwrites elements it would still read"
            if reason is None:
                nodes[position] = merged
            elif reason != _SAME_SHAPE:
                ctx.verdict("inline", name, "stored", reason)
    return drop_dead(graph.with_nodes(tuple(nodes)), ctx)


_SAME_SHAPE = "computed once for readers of its own shape"


def _refusal(graph: Graph, producer: Pointwise, reader: Node, name: str) -> str | None:
    """Why ``producer`` is not inlined into ``reader``; None if it is."""
    if not isinstance(reader, Loop):
        return "its reader is no loop"
    if isinstance(reader, Store) and any(name in _names(b) for b in reader.bind):
        return "it decides where a store goes"
    body = producer.expr
    cost = ex.flops(body)
    if not ex.loads(body) and cost == 0:
        return None
    if _count_ops(body) + sum(map(_count_ops, reader.exprs)) > MAX_OPS:
        return f"the body would exceed {MAX_OPS} operations"
    hints = graph.size_hints
    sites = {load for root in reader.exprs for load in ex.loads(root) if load.buffer == name}
    evaluations = hint(_iterations(reader), hints) * len(sites)
    elements = max(1, hint(producer.out.numel, hints))
    users = graph.users[name]
    stored_anyway = name in graph.output_names or any(not isinstance(graph.nodes[u], Loop) for u in users)
    if len(users) == 1 and not stored_anyway and evaluations <= elements:
        return None
    itemsize = producer.out.dtype.itemsize
    moved = _input_bytes(graph, body, elements)
    recompute = cost * evaluations + FLOPS_PER_BYTE * moved * max(0, evaluations - elements)
    traffic = itemsize * (evaluations + (0 if stored_anyway else elements))
    if not stored_anyway and len(users) > 1 and _read_across(graph, name):
        # no kernel has both: each reader is charged its reads, and credited its share of the producer's reads and write
        share = elements // _loop_shapes(graph, users)
        recompute += FLOPS_PER_BYTE * moved * (min(evaluations, elements) - share)
        traffic = itemsize * (evaluations + share)
    elif len(users) > 1 or stored_anyway:
        if evaluations <= elements and cost > 2 * FLOPS_PER_BYTE:
            return _SAME_SHAPE
        recompute += FLOPS_PER_BYTE * moved * min(evaluations, elements)
    if recompute <= FLOPS_PER_BYTE * traffic:
        return None
    return f"recomputing takes {recompute} operations, {traffic} bytes of traffic are worth {FLOPS_PER_BYTE * traffic}"


def _input_bytes(graph: Graph, body: ex.Expr, elements: int) -> int:
    """Bytes read for each evaluation of ``body``; what all evaluations share comes from the cache."""
    found = 0
    for load in ex.loads(body):
        distinct = hint(graph.value(load.buffer).numel, graph.size_hints)
        found += load.dtype.itemsize if 2 * distinct > elements else 0
    return found


def _loop_shapes(graph: Graph, users: Iterable[int]) -> int:
    """In how many kernels these loops may end at best: those of one shape in one."""
    found = set()
    for user in users:
        node = graph.nodes[user]
        raxes = node.raxes if isinstance(node, Reduction) else ()
        found.add((tuple(size for _, size in loop_axes(node)), len(raxes)))  # type: ignore[arg-type]
    return len(found)


def _read_across(graph: Graph, name: str) -> bool:
    """Whether a reduction reads ``name`` in another order than its own, so that no kernel computes it on the way."""
    for user in graph.users[name]:
        reader = graph.nodes[user]
        if isinstance(reader, Reduction):
            order = tuple(var for var, size in (*reader.axes, *reader.raxes) if size != 1)
            loads = (load for root in reader.exprs for load in ex.loads(root) if load.buffer == name)
            if any(tuple(at for at in load.index if not at.is_Integer) != order for load in loads):
                return True
    return False


def _names(root: ex.Expr) -> set[str]:
    return {load.buffer for load in ex.loads(root)}


def _count_ops(root: ex.Expr) -> int:
    return sum(1 for node in ex.walk(root) if isinstance(node, ex.Op | ex.Masked))


def _iterations(node: Loop) -> Size:
    total: Size = 1
    for _, size in loop_axes(node):
        total = total * size
    return total


def _inline(reader: Node, producer: Pointwise) -> Node:
    """``reader`` with every load of the producer's value replaced by the producer's body at that position."""
    assert isinstance(reader, Loop)
    ranges: Ranges = dict(loop_axes(reader))
    name = producer.out.name

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if not isinstance(node, ex.Load) or node.buffer != name:
            return None
        mapping = {var: at for (var, _), at in zip(producer.axes, node.index, strict=True)}
        return tidy(ex.substitute(producer.expr, mapping, node.bind), ranges)

    origin = producer.origin | reader.origin
    if isinstance(reader, Store):  # where it goes is left as it is
        return replace(reader, expr=ex.transform(reader.expr, leaf), origin=origin)
    return replace(reader.map(lambda e: ex.transform(e, leaf)), origin=origin)


def _divides(node: ex.Expr) -> bool:
    indices = node.index if isinstance(node, ex.Load) else (node.expr,) if isinstance(node, ex.Index) else ()
    return any(index.has(FloorDiv, Mod) for index in indices)


def tidy(root: ex.Expr, ranges: Ranges) -> ex.Expr:
    """Simplify the index arithmetic of ``root`` under the loop ranges."""

    if not any(_divides(node) for node in ex.walk(root)):
        return root

    def short(entry: sympy.Expr) -> sympy.Expr:
        return simplify(entry, ranges) if entry.has(FloorDiv, Mod) else entry

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if isinstance(node, ex.Load):
            return ex.load(node.buffer, tuple(short(i) for i in node.index), node.dtype, node.bind)
        if isinstance(node, ex.Index):
            return ex.index(short(node.expr), node.dtype, node.bind)
        return None

    return ex.transform(root, leaf)


def _write_positions(graph: Graph, roots: dict[str, str]) -> dict[str, list[int]]:
    """Positions at which each storage is written after its creation."""
    found: dict[str, list[int]] = {}
    for position, node in enumerate(graph.nodes):
        for name in node.mutates:
            found.setdefault(roots[name], []).append(position)
    return found


def _crosses_write(
    producer: Pointwise, start: int, end: int, roots: dict[str, str], writes: dict[str, list[int]]
) -> bool:
    """Whether what ``producer`` read, or what it made (through a view), is written between it and its reader."""
    names = (*producer.operands, producer.out.name)
    return any(start < position < end for name in names for position in writes.get(roots.get(name, name), ()))
