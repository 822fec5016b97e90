"""Layout decisions: a loop result that only loops read is stored in the order in which its own inputs are stored.

What the caller, a library or a collective sees keeps the layout eager PyTorch gives it.
"""

from __future__ import annotations

from dataclasses import replace

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.nodes import Loop, Node, Pointwise
from dcompile.ir.types import Size, Value


def choose_layouts(graph: Graph, ctx: Context) -> Graph:
    """Give every free Pointwise result the dimension order of its largest same-shaped input.

    Free means: read by loops only, never written into, not returned. Loops address values by coordinates, so readers
    need no change.
    """
    written = {name for node in graph.nodes for name in node.mutates}
    changed: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Pointwise) and _is_free(graph, node.out.name, written):
            order = _input_order(graph, node, changed)
            if order is not None:
                stride = dense_stride(node.out.shape, order)
                if stride != node.out.stride:
                    changed[node.out.name] = replace(node.out, stride=stride)
                    ctx.verdict("layout", node.out.name, f"dimension order {order}", "its largest input has it")
                    node = replace(node, out=changed[node.out.name])
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _is_free(graph: Graph, name: str, written: set[str]) -> bool:
    return (
        name not in graph.output_names
        and name not in written
        and all(isinstance(graph.nodes[u], Loop) for u in graph.users[name])
    )


def _input_order(graph: Graph, node: Pointwise, changed: dict[str, Value]) -> tuple[int, ...] | None:
    """Dimensions outermost first as the largest input read at every coordinate stores them; None if none is."""
    best: tuple[int, tuple[int, ...]] | None = None
    dims = {var: d for d, (var, _) in enumerate(node.axes)}
    for load in ex.loads(node.expr):
        if load.bind or not all(at in dims for at in load.index) or len(set(load.index)) != len(dims):
            continue
        value = changed.get(load.buffer) or graph.value(load.buffer)
        steps = {dims[at]: hint(step, graph.size_hints) for at, step in zip(load.index, value.stride, strict=True)}
        order = dimension_order(tuple(steps[d] for d in range(len(dims))))
        size = hint(value.nbytes, graph.size_hints)
        if best is None or size > best[0]:
            best = (size, order)
    return best[1] if best else None


def dimension_order(stride: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions outermost first as ``stride`` stores them; equal strides keep their order."""
    return tuple(sorted(range(len(stride)), key=lambda d: (-stride[d], d)))


def dense_stride(shape: tuple[Size, ...], order: tuple[int, ...]) -> tuple[Size, ...]:
    """Strides without gaps for dimensions stored in ``order``, outermost first."""
    stride: dict[int, Size] = {}
    step: Size = 1
    for dim in reversed(order):
        stride[dim] = step
        step = step * (1 if shape[dim] == 0 else shape[dim])
    return tuple(stride[d] for d in range(len(shape)))
