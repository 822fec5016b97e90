"""Layout decisions: a loop result that only loops read is stored in the order in which its own inputs are stored.

What the caller, a library or a collective sees keeps the layout eager PyTorch gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.nodes import Loop, Node, Pointwise, Store, loop_axes
from dcompile.ir.types import Size, Value


def choose_layouts(graph: Graph, ctx: Context) -> Graph:
    """Give every free Pointwise result the dimension order in which most bytes around it are stored.

    Free means: read by loops only, never written into, not returned. Loops address values by coordinates, so readers
    need no change. Bytes around it are those of its inputs and of what its readers read and write beside it.
    """
    written = {name for node in graph.nodes for name in node.mutates}
    changed: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Pointwise) and _is_free(graph, node.out.name, written):
            votes = _votes(graph, node, changed, written)
            order = max(votes, key=lambda o: votes[o], default=())  # the inputs' where it is a tie
            stride = dense_stride(node.out.shape, order) if votes else node.out.stride
            if stride != node.out.stride:
                changed[node.out.name] = replace(node.out, stride=stride)
                reason = f"{votes[order]} of {sum(votes.values())} bytes read and written beside it have it"
                ctx.verdict("layout", node.out.name, f"dimension order {order}", reason)
                node = replace(node, out=changed[node.out.name])
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _is_free(graph: Graph, name: str, written: set[str]) -> bool:
    return (
        name not in graph.output_names
        and name not in written
        and all(isinstance(graph.nodes[u], Loop) for u in graph.users[name])
    )


Order = tuple[int, ...]
"""Dimensions, outermost first."""


def dimension_order(stride: tuple[int, ...]) -> Order:
    """Dimensions outermost first as ``stride`` stores them; equal strides keep their order."""
    return tuple(sorted(range(len(stride)), key=lambda d: (-stride[d], d)))


def _order_of(strides: Sequence[Size], graph: Graph) -> Order:
    return dimension_order(tuple(hint(step, graph.size_hints) for step in strides))


def _votes(graph: Graph, node: Pointwise, changed: dict[str, Value], written: set[str]) -> dict[Order, int]:
    """Bytes that are stored in each order of the dimensions of ``node``."""
    votes: dict[Order, int] = {}

    def count(value: Value, position: Sequence[sympy.Expr], dims: dict[sympy.Symbol, int]) -> None:
        if len(position) != len(dims) or len(set(position)) != len(dims) or not all(at in dims for at in position):
            return
        steps = {dims[at]: step for at, step in zip(position, value.stride, strict=True)}  # type: ignore[index]
        order = _order_of([steps[d] for d in range(len(dims))], graph)
        votes[order] = votes.get(order, 0) + hint(value.nbytes, graph.size_hints)

    def inputs(loop: Loop, dims: dict[sympy.Symbol, int], without: str) -> None:
        loads = dict.fromkeys(load for root in loop.exprs for load in ex.loads(root))
        for load in loads:
            if not load.bind and load.buffer != without:
                count(changed.get(load.buffer) or graph.value(load.buffer), load.index, dims)

    inputs(node, {var: d for d, (var, _) in enumerate(node.axes)}, node.out.name)
    for user in graph.users[node.out.name]:
        reader = graph.nodes[user]
        if not isinstance(reader, Loop):
            continue
        for load in dict.fromkeys(e for root in reader.exprs for e in ex.loads(root)):
            axes = {var for var, _ in loop_axes(reader)}
            if load.buffer != node.out.name or load.bind or set(load.index) != axes or len(load.index) != len(axes):
                continue
            dims = {var: d for d, var in enumerate(load.index)}
            inputs(reader, dims, node.out.name)
            if isinstance(reader, Store):
                count(reader.out, reader.index, dims)
            elif isinstance(reader, Pointwise) and not _is_free(graph, reader.out.name, written):
                count(reader.out, tuple(var for var, _ in reader.axes), dims)
    return votes


def dense_stride(shape: tuple[Size, ...], order: tuple[int, ...]) -> tuple[Size, ...]:
    """Strides without gaps for dimensions stored in ``order``, outermost first."""
    stride: dict[int, Size] = {}
    step: Size = 1
    for dim in reversed(order):
        stride[dim] = step
        step = step * (1 if shape[dim] == 0 else shape[dim])
    return tuple(stride[d] for d in range(len(shape)))
