"""Matrix products beside the collectives that feed them or that they feed: both cut into parts that overlap.

A gathered activation is multiplied as soon as a part of it has arrived, and a part of a product is reduced while the
next is computed (async tensor parallelism: Wang et al., ASPLOS 2023). The parts are cut from every rank's own rows, not
from the ranks as in a ring, so that all ranks run the same program and any collective of the backend serves.

    r = all_gather x; y = matmul r w    becomes    r0 = all_gather x0; y0 = matmul r0 w; r1 = all_gather x1; ...
    z = reduce_scatter (matmul x w)     becomes    z0 = reduce_scatter (matmul x0 w); z1 = ...

Rows that a part brings lie together in the product where the first dimension is not the gathered one (a batch in front
of the sequence); then nothing is copied: parts are written side by side (``Pack``). Otherwise the product, or the first
operand of a reduced one, is copied once, which loops around it usually absorb.
"""

from __future__ import annotations

from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph
from dcompile.schedule.bucket import scheduled_us
from dcompile.schedule.cut_product import cut
from dcompile.schedule.overlap import GAIN
from dcompile.schedule.product_sites import Site, product_sites

STAGE = "async_matmul"

PARTS = (2, 4)
"""Numbers of parts tried. More parts hide more of the wire time and pay its latency more often."""


def async_matmuls(graph: Graph, ctx: Context) -> Graph:
    """Cut what gains by it: ``graph`` itself unless a cut form is predicted faster.

    Leaves a verdict for every number of parts tried.
    """
    sites = [site for site in product_sites(graph) if _worthwhile(site, graph, ctx)]
    if not sites:
        return graph
    plain_us = best_us = scheduled_us(graph, ctx)
    best, chosen = graph, 1
    tried = []
    for parts in PARTS:
        changed = cut(graph, sites, parts)
        if changed is graph:
            continue
        us = scheduled_us(changed, ctx)
        tried.append((parts, us))
        if us < (1 - GAIN) * best_us:
            best, best_us, chosen = changed, us, parts
    for parts, us in tried:
        decision = "taken" if parts == chosen else "not taken"
        reason = f"predicted {us:.0f} us, whole {plain_us:.0f} us"
        ctx.verdict(STAGE, f"{graph.name}: {len(sites)} collectives in {parts} parts", decision, reason)
    return best


CHEAP = 0.25
"""Sites that could hide less than this share of an empty collective are not tried: the latency of the further parts is
mostly covered, too. What is tried is taken only if the whole schedule is predicted faster."""


def _worthwhile(site: Site, graph: Graph, ctx: Context) -> bool:
    """Whether hiding half of the wire time could gain more than a little of one more collective's latency."""
    start = graph.nodes[site.start]
    assert isinstance(start, Start)
    empty_us = ctx.costs.link(start.group.label).by(start.via).transfer_us(start.kind, 0, start.group.size)
    hidden_us = ctx.costs.transfer_us(start, graph) * (1 - min(ctx.costs.contention(start), 1.0)) / 2
    return hidden_us > CHEAP * empty_us
