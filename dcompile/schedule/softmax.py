"""The maximum of a long row and the sum of exponentials below it read the row once on a GPU.

Both are reductions of the same elements, and the second needs the first: over a row that registers cannot hold they are
two passes over memory. Here each row is cut into chunks that registers hold. A chunk gives its own maximum and its sum
of exponentials below that; a second stage combines chunks by ``sum_c s[c] * exp(m[c] - max(m))`` (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import product
from dcompile.ir.nodes import Node, Reduction
from dcompile.ir.types import DType

LONGEST_ROW = 16384
"""Elements of a row that a GPU program holds in registers, so that a second pass over it costs nothing."""

SHORTEST_CHUNK, LONGEST_CHUNK = 1024, 4096
"""Elements of a chunk: enough to fill several warps, few enough for several programs on one multiprocessor. Softmax
over rows of 4096 runs at 97 % of an H100's copy bandwidth."""

Cut = Callable[[Reduction, int], tuple[Reduction, Reduction]]
"""Two stages of a reduction of one row, the first of which reduces each of a number of parts."""


def chunk_softmax(graph: Graph, ctx: Context, cut: Cut) -> Graph:
    """LOOPS to LOOPS: pairs of a maximum and a sum of exponentials over long rows on a GPU in chunks."""
    pairs = {found[1].out.name: found for node in graph.nodes if (found := _pair(graph, node)) is not None}
    if not pairs:
        return graph
    tops = {top.out.name: cut(top, parts) for top, _, parts in pairs.values()}
    nodes: list[Node] = []
    for node in graph.nodes:
        name = node.defs[0].name if node.defs else ""
        if name in tops:
            nodes += tops[name]
        elif name in pairs:
            top, total, parts = pairs[name]
            nodes += _in_chunks(total, cut(total, parts), top, tops[top.out.name][0])
            ctx.verdict("softmax", name, f"{parts} chunks of each row", "maximum and sum read the row once")
        else:
            nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _pair(graph: Graph, node: Node) -> tuple[Reduction, Reduction, int] | None:
    """The maximum that ``node`` is a sum of exponentials below, ``node``, and the number of chunks for both."""
    if not isinstance(node, Reduction) or node.kind != "sum" or node.out.device != "cuda":
        return None
    row = product(tuple(size for _, size in node.raxes))
    parts = chunks_of(row) if isinstance(row, int) else None
    if parts is None or not isinstance(node.expr, ex.Op) or node.expr.name != "exp":
        return None
    below = node.expr.args[0]
    if not isinstance(below, ex.Op) or below.name != "sub" or not isinstance(below.args[1], ex.Load):
        return None
    load = below.args[1]
    maker = graph.producer.get(load.buffer)
    top = graph.nodes[maker] if maker is not None else None
    if not isinstance(top, Reduction) or top.kind != "max" or load.bind or top.out.dtype is not top.expr.dtype:
        return None
    if top.expr.dtype not in (DType.F32, DType.F64) or len(top.raxes) != len(node.raxes):
        return None
    names: dict[sympy.Symbol, sympy.Expr] = {var: at for (var, _), at in zip(top.axes, load.index, strict=True)}
    names |= {old: new for (old, _), (new, _) in zip(top.raxes, node.raxes, strict=True)}
    same = [size for _, size in top.raxes] == [size for _, size in node.raxes]
    return (top, node, parts) if same and ex.substitute(top.expr, names) == below.args[0] else None


def chunks_of(row: int) -> int | None:
    """Into how many chunks a row is cut; None if it is short.

    Equal chunks if there are such: those that fill most lanes of a block, whose length is a power of two; of those that
    fill as many, the longest. Else as few as possible, the last of them ragged.
    """
    if row <= LONGEST_ROW:
        return None
    lengths = [n for n in range(SHORTEST_CHUNK, LONGEST_CHUNK + 1) if row % n == 0]
    best = max(lengths, key=lambda n: (n / 2 ** math.ceil(math.log2(n)), n), default=None)
    return -(-row // LONGEST_CHUNK) if best is None else row // best


def _in_chunks(
    total: Reduction, stages: tuple[Reduction, Reduction], top: Reduction, tops: Reduction
) -> tuple[Reduction, Reduction]:
    """The stages of the sum: below the chunk's maximum, then scaled to the row's.

    A chunk of nothing but -inf has the sum 0 below 0, not below -inf.
    """
    first, second = stages
    (part, _) = first.axes[-1]

    def shifted(node: ex.Expr) -> ex.Expr | None:
        if not isinstance(node, ex.Load) or node.buffer != top.out.name:
            return None
        mine = ex.load(tops.out.name, (*node.index, part), tops.out.dtype)
        lowest = ex.const(-math.inf, mine.dtype)
        return ex.op("where", ex.op("eq", mine, lowest), ex.const(0.0, mine.dtype), mine)

    (row,) = (n for n in ex.walk(total.expr) if isinstance(n, ex.Load) and n.buffer == top.out.name)
    (position,) = (var for var, _ in second.raxes)
    highest = ex.load(tops.out.name, (*row.index, position), tops.out.dtype)
    scale = ex.op("exp", ex.op("sub", highest, row))
    scaled = ex.op("mul", second.expr, scale)
    return replace(first, expr=ex.transform(first.expr, shifted)), replace(second, expr=scaled)


__all__ = ["chunk_softmax", "chunks_of"]
