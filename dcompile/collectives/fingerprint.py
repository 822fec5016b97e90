"""What ranks must have in common: the collectives of a program in launch order, one line each.

Compute may differ from rank to rank (one rank logs, another does not use a result); launches may not. A packed bucket
is only the same if it packs the same parts in the same order, so its line names them. Buckets are chosen by predicted
times, so ranks with very different compute may bucket differently: then they are told, and can fix ``bucket_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable

from dcompile.collectives.nodes import Start, Via
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Node, Pack
from dcompile.ir.types import Value


def communication_lines(graph: Graph, place: Callable[[str], str] | None = None) -> tuple[str, ...]:
    """One line for each Start: kind, group and operands, then the source line as a comment behind ``#``.

    Args:
        place: says where a result lies that other ranks write themselves; None leaves that out.
    """
    return tuple(_line(graph, node, place) for node in graph.nodes if isinstance(node, Start))


def _line(graph: Graph, start: Start, place: Callable[[str], str] | None) -> str:
    kind = start.kind.value + (f".{start.reduction}" if start.reduction else "")
    root = f" root {start.root}" if start.root is not None else ""
    sources = ", ".join(_operand(graph, name) for name in start.sources)
    if start.in_splits:  # how many rows go where may differ from rank to rank
        value = graph.value(start.sources[0])
        sources = f"{value.dtype.value}[{', '.join(('*', *map(str, value.shape[1:])))}] in shares"
    comment = f"  # {start.origin.source}" if start.origin.source else ""
    via = "" if start.via is Via.LIBRARY else f" via {start.via.value}"
    if place is not None and start.via is Via.PEERS:
        via += f" to {', '.join(place(result.name) for result in start.pending.results)}"
    return f"{kind} @{start.group.label}[{start.group.size}]{root} ({sources}){via}{comment}"


def _operand(graph: Graph, name: str) -> str:
    position = graph.producer.get(name)
    node: Node | None = graph.nodes[position] if position is not None else None
    if isinstance(node, Pack):
        parts = ", ".join(f"{part}: {_type(graph.value(part))}" for part in node.parts)
        return f"pack({parts})"
    return _type(graph.value(name))


def _type(value: Value) -> str:
    return f"{value.dtype.value}[{', '.join(map(str, value.shape))}]"
