"""Sums over ranks as exchanges: the summands travel, and the sum is taken where they arrive.

An all-reduce becomes an all-gather, a reduce-scatter an all-to-all, each followed by a loop that adds in the order of
the ranks. That pays in two cases. Gradients of mixed-precision training are bf16 products converted to f32 before they
are summed: all ranks convert alike, so the bf16 can travel and be converted on arrival, half the bytes and nothing
rounded that was not rounded before. And copy engines, which cannot add, can carry the summands; the loop that adds is
fused with what follows. With two ranks and f32 the result is the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.collectives.rules import is_contiguous, result_value
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import as_expr, symbol
from dcompile.ir.nodes import Axis, Node, Pointwise
from dcompile.ir.types import DType, Value
from dcompile.schedule.lowering import byte_us
from dcompile.schedule.simplify import drop_dead

STAGE = "exchange"

EXCHANGES = {Kind.ALL_REDUCE: Kind.ALL_GATHER, Kind.REDUCE_SCATTER: Kind.ALL_TO_ALL}
"""What replaces a reduction: every rank gets all summands of what it keeps."""

LEAST_GAIN = 0.1
"""Share of its price that a reduction must save: the loop needs more memory than a sum in place."""


@dataclass(frozen=True)
class _Summand:
    """``source[axes] = expr`` with one load of ``narrow``, from the same position; ``narrow`` may be the source.

    Attributes:
        since: position of the first node that read ``narrow``, or of the launch.
    """

    narrow: Value
    axes: tuple[Axis, ...]
    expr: ex.Expr
    since: int


def exchange_sums(graph: Graph, ctx: Context) -> Graph:
    """Replace sums over ranks by exchanges where these are predicted to cost less; a verdict for each sum."""
    waits = {node.pending: at for at, node in enumerate(graph.nodes) if isinstance(node, Wait)}
    roots = storage_roots(graph)
    written = [(at, roots[name]) for at, node in enumerate(graph.nodes) for name in node.mutates if name in roots]
    changed: dict[int, tuple[Node, ...]] = {}
    for at, start in enumerate(graph.nodes):
        if not isinstance(start, Start) or not _is_plain_sum(graph, start):
            continue
        found = _summand(graph, start.sources[0], at)
        if any(found.since < there < at and root == roots[found.narrow.name] for there, root in written):
            ctx.verdict(STAGE, start.pending.name, "reduced", f"{found.narrow.name} is overwritten before the launch")
            continue
        sum_us, exchange_us = _prices_us(graph, ctx, start, found)
        words = (
            f"{exchange_us:.0f} us as {EXCHANGES[start.kind].value} of {found.narrow.dtype.value}, {sum_us:.0f} us as"
        )
        words += f" {start.kind.value} of {graph.value(start.sources[0]).dtype.value}"
        if exchange_us > (1 - LEAST_GAIN) * sum_us:
            ctx.verdict(STAGE, start.pending.name, "reduced", words)
            continue
        ctx.verdict(STAGE, start.pending.name, "exchanged", words)
        wait = waits[start.pending.name]
        changed[at], changed[wait] = _exchange(graph, start, graph.nodes[wait], found)
    if not changed:
        return graph
    nodes = tuple(new for at, node in enumerate(graph.nodes) for new in changed.get(at, (node,)))
    return drop_dead(graph.with_nodes(nodes).check(), ctx)


def _is_plain_sum(graph: Graph, start: Start) -> bool:
    """A sum of one tensor of floats with a dimension, out of place."""
    if start.kind not in EXCHANGES or start.reduction not in ("sum", "avg") or start.pending.in_place:
        return False
    value = graph.value(start.sources[0])
    return len(start.sources) == 1 and bool(value.shape) and value.dtype.is_float


def _summand(graph: Graph, source: str, launch: int) -> _Summand:
    """The narrowest tensor from which ``source`` follows element by element; the source itself if none is narrower."""
    value, name = graph.value(source), source
    axes = tuple((symbol(f"i{n}"), size) for n, size in enumerate(value.shape))
    expr: ex.Expr = ex.load(source, tuple(var for var, _ in axes), value.dtype)
    best = _Summand(value, axes, expr, launch)
    while name in graph.producer:
        at = graph.producer[name]
        node = graph.nodes[at]
        load = _only_load(graph, node)
        if load is None or not isinstance(node, Pointwise):
            break
        renamed = dict(zip((var for var, _ in node.axes), (var for var, _ in axes), strict=True))
        expr = _with_load(expr, ex.substitute(node.expr, renamed))
        name = load.buffer
        narrow = graph.value(name)
        if narrow.dtype.itemsize < best.narrow.dtype.itemsize and is_contiguous(narrow):
            best = _Summand(narrow, axes, expr, at)
    return best


def _with_load(expr: ex.Expr, value: ex.Expr) -> ex.Expr:
    """``expr`` with ``value`` in place of its load."""
    return ex.transform(expr, lambda e: value if isinstance(e, ex.Load) else None)


def _only_load(graph: Graph, node: Node) -> ex.Load | None:
    """The load of a loop that computes each element from the same element of one tensor and constants; else None."""
    if not isinstance(node, Pointwise) or any(isinstance(e, ex.Index) for e in ex.walk(node.expr)):
        return None
    found = ex.loads(node.expr)
    if len(found) != 1 or found[0].bind or graph.value(found[0].buffer).shape != node.out.shape:
        return None
    here = tuple(as_expr(0) if size == 1 else var for var, size in node.axes)
    index = tuple(as_expr(0) if size == 1 else i for (_, size), i in zip(node.axes, found[0].index, strict=True))
    return found[0] if index == here else None


def _prices_us(graph: Graph, ctx: Context, start: Start, found: _Summand) -> tuple[float, float]:
    """Of the reduction and of the exchange with the loop behind it, less the loop that converts before it now."""
    link, ranks, hints = ctx.costs.link(start.group.label), start.group.size, graph.size_hints
    source = graph.value(start.sources[0])
    wide, narrow = hint(source.nbytes, hints), hint(found.narrow.nbytes, hints)
    kept = wide if start.kind is Kind.ALL_REDUCE else wide // ranks
    exchanged = narrow * ranks if start.kind is Kind.ALL_REDUCE else narrow
    added = exchanged + kept
    if found.narrow.name != source.name:
        added -= narrow + wide
    loop_us = added / ctx.costs.roofline(source.device).bytes_per_us
    exchange = EXCHANGES[start.kind]
    return byte_us(link, start.kind, ranks) * wide, byte_us(link, exchange, ranks) * exchanged + loop_us


def _exchange(graph: Graph, start: Start, wait: Node, found: _Summand) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Nodes in place of the launch and in place of the wait."""
    assert isinstance(wait, Wait), "a pending is waited for by a wait"
    out, ranks = wait.outs[0], start.group.size
    name = _fresh(graph, f"{out.name}_summands")
    kind = EXCHANGES[start.kind]
    summands = result_value(kind, name, found.narrow, ranks)
    pending = Pending(_fresh(graph, f"{name}_flight"), (summands,), in_place=False)
    launch = Start(pending=pending, kind=kind, group=start.group, sources=(found.narrow.name,), origin=start.origin)
    landing = Wait(outs=(summands,), pending=pending.name, origin=wait.origin)
    rows = as_expr(out.shape[0])
    first, *rest = (var for var, _ in found.axes)

    wide = DType.F32 if out.dtype.is_low_precision else out.dtype

    def of_rank(rank: int) -> ex.Expr:
        load = ex.load(name, (first + rank * rows, *rest), found.narrow.dtype)
        return ex.to(_with_load(found.expr, load), wide)

    total = reduce(lambda a, b: ex.op("add", a, b), map(of_rank, range(ranks)))
    if start.reduction == "avg":
        total = ex.op("div", total, ex.const(ranks, total.dtype))
    total = ex.to(total, out.dtype)
    axes = tuple((var, size) for (var, _), size in zip(found.axes, out.shape, strict=True))
    return (launch,), (landing, Pointwise(out=out, axes=axes, expr=total, origin=wait.origin))


def _fresh(graph: Graph, wish: str) -> str:
    """``wish``, or with a number behind it a name that the graph does not use."""
    name, count = wish, 0
    while name in graph.defs:
        count += 1
        name = f"{wish}{count}"
    return name
