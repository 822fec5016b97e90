"""Two rewrites that let all-reduces and broadcasts work in the memory of their sources.

``recover_in_place`` undoes what functionalisation did to ``dist.all_reduce(x)``: a launch out of place, a wait and a
copy back into ``x`` become one launch in place. ``donate_sources`` lets a launch work in a temporary that dies there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Kind, Start, Wait
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, Pack, Pointwise, Reduction, Ref, Scan, Store
from dcompile.ir.types import Value

_KINDS = (Kind.ALL_REDUCE, Kind.BROADCAST)
"""Kinds whose result has the shape of the source."""


@dataclass(frozen=True)
class _Flight:
    """An out-of-place launch with its wait, by position."""

    start: Start
    at: int
    wait: int
    results: tuple[Value, ...]


def _flights(graph: Graph) -> list[_Flight]:
    """Launches that could work in place: same layout of source and result, no source named twice."""
    waits = {node.pending: at for at, node in enumerate(graph.nodes) if isinstance(node, Wait)}
    found = []
    for at, node in enumerate(graph.nodes):
        if not isinstance(node, Start) or node.kind not in _KINDS or node.pending.in_place:
            continue
        sources = [graph.value(name) for name in node.sources]
        results = node.pending.results
        alike = all(
            (s.dtype, s.shape, s.stride) == (r.dtype, r.shape, r.stride) for s, r in zip(sources, results, strict=True)
        )
        if alike and len(set(node.sources)) == len(node.sources):
            found.append(_Flight(node, at, waits[node.pending.name], results))
    return found


def _touching(graph: Graph, roots: dict[str, str]) -> dict[str, list[int]]:
    """For each storage the positions of the nodes that read or write it, ascending; outputs count as the end."""
    found: dict[str, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        for root in {roots[name] for name in node.operands if name in roots}:
            found.setdefault(root, []).append(at)
    for name in graph.output_names:
        found.setdefault(roots[name], []).append(len(graph.nodes))
    return found


# copies back ---------------------------------------------------------------------------------------------------------


def _copies_back(graph: Graph, store: Node, result: Value, source: str) -> bool:
    """Whether ``store`` overwrites all of ``source`` with ``result``, element by element."""
    if not isinstance(store, Store) or store.target != source or store.mode != "set" or store.bind:
        return False
    target = graph.value(source)
    here = tuple(0 if n == 1 else var for var, n in store.axes)
    if tuple(n for _, n in store.axes) != target.shape or not isinstance(store.expr, ex.Load):
        return False
    index = tuple(0 if n == 1 else i for (_, n), i in zip(store.axes, store.index, strict=True))
    read = tuple(0 if n == 1 else i for (_, n), i in zip(store.axes, store.expr.index, strict=True))
    return index == here and read == here and store.expr.buffer == result.name and not store.expr.bind


def _stores_back(graph: Graph, flight: _Flight) -> list[int] | None:
    """Positions of the stores that copy every result over its source; None if one is missing."""
    found = []
    for source, result in zip(flight.start.sources, flight.results, strict=True):
        users = [at for at in graph.users[result.name] if _copies_back(graph, graph.nodes[at], result, source)]
        if len(users) != 1 or users[0] < flight.wait:
            return None
        found.append(users[0])
    return found


def _undisturbed(flight: _Flight, stores: list[int], touching: dict[str, list[int]], roots: dict[str, str]) -> bool:
    """Whether nobody else touches a source between launch and copy, nor the old version after it."""
    own = {flight.at, *stores}
    return all(
        at < flight.at or at in own or at > store
        for source, store in zip(flight.start.sources, stores, strict=True)
        for at in touching[roots[source]]
    )


def _result_outlives_change(graph: Graph, result: Value, source: str, store: int, roots: dict[str, str]) -> bool:
    """Whether the source is written again after the copy while the result itself is still read by others."""
    others = [at for at in graph.users[result.name] if at != store]
    rewritten = any(
        roots[name] == roots[source] for node in graph.nodes[store + 1 :] for name in node.mutates if name in roots
    )
    stale = any(source in node.operands for node in graph.nodes[store + 1 :]) or source in graph.output_names
    return stale or (rewritten and (bool(others) or result.name in graph.output_names))


def recover_in_place(graph: Graph, ctx: Context) -> Graph:
    """Turn ``start x … wait; store x = result`` into a launch in place, where nothing can tell the difference."""
    roots, changed = storage_roots(graph), dict[int, Node]()
    touching, renamed, dropped = _touching(graph, roots), dict[str, str](), set[int]()
    for flight in _flights(graph):
        stores = _stores_back(graph, flight)
        if stores is None or not _undisturbed(flight, stores, touching, roots):
            continue
        pairs = zip(flight.results, flight.start.sources, stores, strict=True)
        if any(_result_outlives_change(graph, r, s, at, roots) for r, s, at in pairs):
            continue
        changed[flight.at] = replace(flight.start, pending=replace(flight.start.pending, in_place=True))
        for result, at in zip(flight.results, stores, strict=True):
            store = graph.nodes[at]
            assert isinstance(store, Store)
            renamed[store.out.name] = result.name
            dropped.add(at)
    return _rewritten(graph, changed, dropped, renamed)


def _rewritten(graph: Graph, changed: dict[int, Node], dropped: set[int], renamed: dict[str, str]) -> Graph:
    if not changed:
        return graph
    nodes = tuple(
        changed.get(at, node).rename(renamed) if renamed else changed.get(at, node)
        for at, node in enumerate(graph.nodes)
        if at not in dropped
    )

    def newest(out: Any) -> Any:
        return Ref(renamed.get(out.name, out.name)) if isinstance(out, Ref) else out

    outputs = tuple(newest(out) for out in graph.outputs)
    return replace(graph, nodes=nodes, outputs=outputs).check()


# donation ------------------------------------------------------------------------------------------------------------


def donate_sources(graph: Graph, ctx: Context) -> Graph:
    """Launch in place on sources that are the program's own temporaries and are not touched after the launch."""
    roots = storage_roots(graph)
    touching = _touching(graph, roots)
    producers = graph.producer
    launches: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            for root in {roots[name] for name in node.sources}:
                launches[root] = launches.get(root, 0) + 1

    def dies(name: str, at: int) -> bool:
        maker = graph.nodes[producers[name]] if name in producers else None
        if roots[name] != name or not isinstance(maker, Pointwise | Reduction | Scan | Pack | Extern):
            return False
        if isinstance(maker, Extern) and maker.out_op is None and maker.fallback:
            return False  # an unknown library op may keep or share what it returns
        return launches[name] == 1 and touching[name][-1] == at

    changed: dict[int, Node] = {
        flight.at: replace(flight.start, pending=replace(flight.start.pending, in_place=True))
        for flight in _flights(graph)
        if all(dies(name, flight.at) for name in flight.start.sources)
    }
    return _rewritten(graph, changed, set(), {})
