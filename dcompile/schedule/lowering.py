"""Who moves the bytes of each collective: the backend, with all it takes or with little, or copy engines straight into
the memory of the other ranks.

Numbers are the same; prices differ: NCCL takes multiprocessors from the compute it runs beside, copy engines hardly
slow it. Chosen before bucketing, so that what travels together is moved by the same means.
"""

from __future__ import annotations

from dataclasses import replace

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.nodes import MOVES, Kind, Start, Via
from dcompile.collectives.rules import is_contiguous
from dcompile.ir.graph import Graph
from dcompile.ir.index import as_size
from dcompile.ir.nodes import Node

STAGE = "lowering"

LARGE_BYTES = 64 << 20
"""Prices are compared at this payload: buckets are large."""


def price_us(way: LinkModel, kind: Kind, ranks: int) -> float:
    """What a large collective adds to a step: all of its time where nothing runs beside it, else ``contention`` of it.
    The mean of both, since neither is known before the schedule."""
    return way.transfer_us(kind, LARGE_BYTES, ranks) * (1 + way.contention) / 2


def byte_us(link: LinkModel, kind: Kind, ranks: int) -> float:
    """The least price of a byte of payload by any lowering that does ``kind``."""
    ways = [link, *(link.by(via) for via in link.others if via is not Via.PEERS or kind in MOVES)]
    return min(price_us(way, kind, ranks) for way in ways) / LARGE_BYTES


def choose_lowerings(graph: Graph, ctx: Context) -> Graph:
    """Set ``Start.via`` by price where a link has several lowerings; a verdict for each collective."""
    roots = storage_roots(graph)
    returned = {roots[name] for name in graph.output_names}
    nodes: list[Node] = list(graph.nodes)
    for at, start in enumerate(graph.nodes):
        if not isinstance(start, Start) or not ctx.costs.link(start.group.label).others:
            continue
        link = ctx.costs.link(start.group.label)
        vias = [Via.LIBRARY, *link.others]
        if Via.PEERS in vias and (reason := _why_no_peers(graph, start, returned)):
            vias.remove(Via.PEERS)
            ctx.verdict(STAGE, start.pending.name, "not via peers", reason)
        prices = {via: price_us(link.by(via), start.kind, start.group.size) for via in vias}
        best = min(prices, key=lambda via: prices[via])
        words = ", ".join(f"{via.value} {us:.0f} us" for via, us in prices.items())
        ctx.verdict(STAGE, start.pending.name, f"via {best.value}", f"{LARGE_BYTES >> 20} MiB add {words}")
        nodes[at] = replace(start, via=best)
    return graph.with_nodes(tuple(nodes)) if any(a is not b for a, b in zip(nodes, graph.nodes, strict=True)) else graph


def _why_no_peers(graph: Graph, start: Start, returned: set[str]) -> str:
    """Why peers cannot write the results; "" if they can."""
    if start.kind not in MOVES:
        return "it computes"
    if start.in_splits:
        return "its shares are unequal"
    for result in start.pending.results:
        if result.name in returned:
            return f"{result.name} is returned and lies in memory of its own"
        if not isinstance(as_size(result.nbytes), int):
            return f"the size of {result.name} is not known before the call"
        if not is_contiguous(result) or result.device != "cuda":
            return f"{result.name} is not contiguous memory of a GPU"
    return ""
