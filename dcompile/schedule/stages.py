"""Long reductions on a GPU become two: many partial results, then one reduction of these.

Partial results have the accumulation dtype. The reduced elements are cut into blocks of equal length; what lies beyond
the end of a ragged last block, or is a whole empty block, is the neutral element and is never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.combine import neutral
from dcompile.ir.graph import Graph, SizeInput, hint
from dcompile.ir.index import FloorDiv, as_expr, as_size, product, simplify, symbol, unflatten
from dcompile.ir.nodes import Axis, Node, Reduction
from dcompile.ir.ops import ARG_REDUCTIONS, WELFORD
from dcompile.ir.types import Size, Value
from dcompile.schedule.inline import tidy
from dcompile.schedule.layout import dense_stride
from dcompile.schedule.loops import coefficient, form_of
from dcompile.schedule.one_hot import close_one_hot_sums
from dcompile.schedule.softmax import chunk_softmax
from dcompile.schedule.split import CPU, Hint, Processor, choose_parts
from dcompile.schedule.strips import StripFinder


def split_reductions(graph: Graph, ctx: Context, reuse: bool = True) -> Graph:
    """Cut every reduction that ``split.choose_parts`` wants cut; a first stage may be cut again.

    Args:
        reuse: a reduction of everything that reads reductions of its rows is cut into these rows, so that one kernel
            can do both.
    """
    if not any(value.device == "cuda" for node in graph.nodes for value in node.defs if isinstance(value, Value)):
        return graph
    graph = close_one_hot_sums(graph, ctx)
    graph = chunk_softmax(graph, ctx, lambda node, parts: _by_blocks(graph, node, parts, Hint.INNER, exact=True))
    nodes: list[Node] = []
    strips = StripFinder(graph, ctx)
    for node in graph.nodes:
        if (in_strips := _in_strips(graph, node, ctx, strips)) is not None:
            nodes += in_strips
            continue
        stages = [node]
        while (cut := _cut(graph, stages[0], ctx, reuse and len(stages) == 1)) is not None:
            stages[0:1] = cut
        nodes += stages
    return graph.with_nodes(tuple(nodes)) if len(nodes) > len(graph.nodes) else graph


def processor_of(device: str, ctx: Context) -> Processor:
    """What reductions on ``device`` are cut for: nothing on a CPU, whose loops are cut for its threads elsewhere."""
    return Processor(ctx.costs.roofline(device).multiprocessors) if device == "cuda" else CPU


def runs_along(graph: Graph, node: Reduction) -> Hint:
    """How most of the bytes that ``node`` reads lie: INNER if neighbours in memory are reduced into one value, OUTER if
    they belong to different values or it is a tie, DEFAULT if nothing is read."""
    form = form_of(graph, node)
    inner = outer = 0
    for root in (form.expr, *form.others):
        for load in ex.loads(root):
            reduced = _shortest(load.index[0], form.raxes, graph)
            kept = _shortest(load.index[0], form.axes, graph)
            touched = [size for var, size in (*form.axes, *form.raxes) if var in load.index[0].free_symbols]
            weight = hint(product(tuple(touched)), graph.size_hints) * load.dtype.itemsize
            if reduced is not None and (kept is None or reduced < kept):
                inner += weight
            elif kept is not None:
                outer += weight
    if inner == outer == 0:
        return Hint.DEFAULT
    return Hint.INNER if inner > outer else Hint.OUTER


def _shortest(address: sympy.Expr, axes: Sequence[Axis], graph: Graph) -> int | None:
    """The shortest step other than 0 that ``address`` takes along ``axes``; None if it takes none of one length."""
    steps = [coefficient(address, var) for var, _ in axes if var in address.free_symbols]
    known = [abs(hint(as_size(step), graph.size_hints)) for step in steps if step is not None]
    return min((step for step in known if step), default=None)


def _cut(graph: Graph, node: Node, ctx: Context, reuse: bool) -> tuple[Reduction, Reduction] | None:
    """Two stages of ``node``, or None if it stays one."""
    if not isinstance(node, Reduction) or node.kind in ARG_REDUCTIONS:
        return None
    processor = processor_of(node.out.device, ctx)
    if not processor.multiprocessors or not has_hints(graph, (*node.axes, *node.raxes)):
        return None
    hints = graph.size_hints
    reduced = hint(product(tuple(size for _, size in node.raxes)), hints)
    outputs = hint(product(tuple(size for _, size in node.axes)), hints)
    runs, parts = choose_parts(reduced, outputs, runs_along(graph, node), processor)
    if parts <= 1:
        return None
    rows = _rows_of_operands(graph, node, reduced) if reuse and outputs == 1 else None
    if rows is not None:
        ctx.verdict("split", node.out.name, "into the rows of its operands", "their reductions share the kernel")
        return _by_rows(graph, node, rows)
    ctx.verdict("split", node.out.name, f"{parts} parts", f"{outputs} outputs of {reduced} elements ({runs.value})")
    return _by_blocks(graph, node, parts, runs)


def _in_strips(graph: Graph, node: Node, ctx: Context, finder: StripFinder) -> tuple[Reduction, Reduction] | None:
    """Two stages of a reduction of columns that may run beside loops over the rows; None if it may not."""
    if not isinstance(node, Reduction) or runs_along(graph, node) is not Hint.OUTER:
        return None
    processor = processor_of(node.out.device, ctx)
    sizes = (product(tuple(size for _, size in axes)) for axes in (node.raxes, node.axes))
    reduced, outputs = (hint(size, graph.size_hints) for size in sizes)
    if not processor.multiprocessors or outputs <= 1:
        return None
    _, parts = choose_parts(reduced, outputs, Hint.OUTER, processor)
    count = finder.strips(node, parts, processor.multiprocessors)
    return None if count is None else _by_blocks(graph, node, count, Hint.OUTER, exact=True)


def has_hints(graph: Graph, axes: Sequence[Axis]) -> bool:
    """Whether every extent is a number or follows from sizes the caller passes."""
    given = {item.symbol for item in graph.inputs if isinstance(item, SizeInput)}
    return all(isinstance(n, int) or n.free_symbols <= given for _, n in axes)


def _rows_of_operands(graph: Graph, node: Reduction, reduced: int) -> int | None:
    """How many leading reduced axes are the rows that every reduction ``node`` reads was made of."""
    if node.kind in WELFORD:
        return None
    rows: set[tuple[int, int]] = set()
    for name in node.operands:
        maker = graph.nodes[graph.producer[name]] if name in graph.producer else None
        if isinstance(maker, Reduction):
            sizes = (product(tuple(n for _, n in axes)) for axes in (maker.axes, maker.raxes))
            outer, inner = (hint(size, graph.size_hints) for size in sizes)
            rows.add((outer, inner))
    if len(rows) != 1:
        return None
    ((outer, inner),) = rows
    if outer * inner != reduced or outer == 1 or inner == 1:
        return None
    leading = 1
    for at, (_, size) in enumerate(node.raxes):
        leading *= hint(size, graph.size_hints)
        if leading == outer:
            return at + 1
    return None


def _by_rows(graph: Graph, node: Reduction, rows: int) -> tuple[Reduction, Reduction]:
    """Stage one reduces each row, stage two the rows."""
    names = {var: _variable(node, f"part{n}_") for n, (var, _) in enumerate(node.raxes[:rows])}
    parts = tuple((names[var], size) for var, size in node.raxes[:rows])
    return _stages(graph, node, parts, node.raxes[rows:], dict(names), None, Hint.INNER)


def _by_blocks(
    graph: Graph, node: Reduction, parts: int, runs: Hint, exact: bool = False
) -> tuple[Reduction, Reduction]:
    """Stage one reduces ``parts`` blocks, of the first reduced axis if that is long enough, else of all in a row.

    Args:
        exact: the first axis is used alone only if ``parts`` divides it.
    """
    first, rest = node.raxes[0], node.raxes[1:]
    if isinstance(first[1], int) and first[1] >= parts and (first[1] % parts == 0 or not exact):
        axes: tuple[Axis, ...] = (first,)
    else:
        axes, rest = node.raxes, ()
    total = product(tuple(size for _, size in axes))
    even = isinstance(total, int) and total % parts == 0
    block: Size = -(-total // parts) if isinstance(total, int) else as_size(FloorDiv(as_expr(total + parts - 1), parts))
    part, inside = _variable(node, "part"), _variable(node, "inside")
    flat = part * as_expr(block) + inside
    places = unflatten(flat, tuple(size for _, size in axes))
    ranges = {part: parts, inside: block}
    mapping = {var: simplify(at, ranges) for (var, _), at in zip(axes, places, strict=True)}
    guard = None if even else ex.op("lt", ex.index(flat), ex.index(as_expr(total)))
    return _stages(graph, node, ((part, parts),), ((inside, block), *rest), mapping, guard, runs)


def _stages(
    graph: Graph,
    node: Reduction,
    parts: tuple[Axis, ...],
    inner: tuple[Axis, ...],
    mapping: dict[sympy.Symbol, sympy.Expr],
    guard: ex.Expr | None,
    runs: Hint,
) -> tuple[Reduction, Reduction]:
    """The two reductions, given the axis of parts, what is left inside one, and the old variables by the new."""
    ranges = dict((*node.axes, *parts, *inner))
    exprs = tuple(tidy(ex.substitute(e, mapping), ranges) for e in node.exprs)
    kind, blank = node.kind, neutral(node.kind, node.expr.dtype)
    if kind == "welford" and guard is not None:  # elements enter with a weight that can be zero
        kind, exprs = "welford_merge", (exprs[0], ex.const(0, exprs[0].dtype), ex.const(1, exprs[0].dtype))
    if guard is not None:
        exprs = tuple(ex.masked(guard, e, blank[k]) for k, e in enumerate(exprs))
    shape = tuple(size for _, size in (*node.axes, *parts))
    rank, kept = len(shape), len(node.axes)
    order = (*range(kept, rank), *range(kept)) if runs is Hint.OUTER else tuple(range(rank))
    stride = dense_stride(shape, order)
    partial = tuple(
        Value(_unused(graph, f"{value.name}_part"), node.expr.dtype, shape, stride, value.device)
        for value in (node.out, *node.more)
    )
    first = Reduction(
        out=partial[0], more=partial[1:], kind=kind, axes=(*node.axes, *parts), raxes=inner, expr=exprs[0],
        others=exprs[1:], origin=node.origin,
    )  # fmt: skip
    position = tuple(var for var, _ in first.axes)
    loads = tuple(ex.load(value.name, position, value.dtype) for value in partial)
    second = replace(
        node, kind="welford_merge" if kind in WELFORD else kind, raxes=parts, expr=loads[0], others=loads[1:]
    )
    return first, second


def _unused(graph: Graph, name: str) -> str:
    while name in graph.defs:
        name += "_"
    return name


def _variable(node: Reduction, stem: str) -> sympy.Symbol:
    """A loop variable that ``node`` does not have."""
    taken = {var for var, _ in (*node.axes, *node.raxes)}
    return next(found for n in range(len(taken) + 1) if (found := symbol(f"{stem}{n}")) not in taken)
