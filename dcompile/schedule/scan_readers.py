"""The elementwise kernel that reads a scan becomes part of it, so that running values do not go through memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import simplify
from dcompile.ir.kernel import Kernel, Let, Nest, ScanLoop, Stmt, Write, expressions
from dcompile.ir.nodes import Axis
from dcompile.ir.types import Size
from dcompile.schedule.inline import tidy
from dcompile.schedule.loops import image
from dcompile.schedule.readers import by_memory, elementwise, place

STAGE = "scans"


def fuse_scan_readers(graph: Graph, ctx: Context) -> Graph:
    """Every scan with the elementwise kernels that read it, one after the other, where no path leads between them."""
    position = 0
    while position < len(graph.nodes):
        merged = _with_a_reader(graph, position, ctx)
        if merged is None:
            position += 1
        else:
            graph = merged
    return graph.check()


def _with_a_reader(graph: Graph, position: int, ctx: Context) -> Graph | None:
    scan = _Scan.of(graph.nodes[position])
    if scan is None:
        return None
    users = sorted({user for out in scan.kernel.outs for user in graph.users[out.name]})
    for at in users:
        reader = graph.nodes[at]
        late = place(graph, position, at) if isinstance(reader, Kernel) else None
        if late is None or not isinstance(reader, Kernel):
            continue
        kernel = _merged(graph, scan, reader, at)
        if kernel is not None:
            ctx.verdict(
                STAGE, reader.outs[0].name, f"computed with {scan.kernel.outs[0].name}", "an elementwise reader"
            )
            stays, goes = (at, position) if late else (position, at)
            nodes = [kernel if n == stays else node for n, node in enumerate(graph.nodes) if n != goes]
            return graph.with_nodes(tuple(nodes))
    return None


@dataclass(frozen=True)
class _Scan:
    """A kernel that is one scan.

    Attributes:
        outer: axes of the nest around its loop.
    """

    kernel: Kernel
    outer: tuple[Axis, ...]
    loop: ScanLoop

    @staticmethod
    def of(node: object) -> _Scan | None:
        if not isinstance(node, Kernel) or len(node.body) != 1:
            return None
        (body,) = node.body
        outer: tuple[Axis, ...] = ()
        if isinstance(body, Nest) and len(body.body) == 1:
            outer, body = body.axes, body.body[0]
        return _Scan(node, outer, body) if isinstance(body, ScanLoop) else None

    def replaced(self, loop: ScanLoop) -> tuple[Stmt, ...]:
        (body,) = self.kernel.body
        return (replace(body, body=(loop,)),) if isinstance(body, Nest) else (loop,)


def _merged(graph: Graph, scan: _Scan, reader: Kernel, at: int) -> Kernel | None:
    """One kernel that does the work of both; None if ``reader`` is not elementwise over the scan's positions."""
    nest = elementwise(reader)
    made = {w.buffer: w for w in scan.loop.writes}
    if nest is None or any(target is not None for target in reader.targets):
        return None
    loads = {load for root in expressions((nest,)) for load in ex.loads(root) if load.buffer in made}
    roots = storage_roots(graph)
    own = {roots[name] for name in made}
    if any(load.bind for load in loads) or any(roots[n] in own and n not in made for n in reader.operands):
        return None
    axes = (*scan.outer, scan.loop.axis)
    mapping = _positions(made, loads, nest, axes)
    if mapping is None:
        return None
    writes = _moved(made, nest, mapping, dict(axes))
    if writes is None:
        return None
    read_elsewhere = {name for name in made if _is_read(graph, name, at)}
    kept = tuple(w for w in scan.loop.writes if w.buffer in read_elsewhere)
    pairs = zip(scan.kernel.outs, scan.kernel.targets, strict=True)
    outs = [(out, target) for out, target in pairs if out.name not in made or out.name in read_elsewhere]
    loop = replace(scan.loop, writes=(*kept, *writes))
    scanned = {roots[load.buffer] for root in expressions((scan.loop,)) for load in ex.loads(root)}
    return Kernel(
        outs=(*(out for out, _ in outs), *reader.outs),
        body=scan.replaced(loop),
        targets=(*(target for _, target in outs), *(None for _ in reader.outs)),
        inplace=tuple(pair for pair in reader.inplace if roots[pair[1]] not in own | scanned),
        origin=scan.kernel.origin | reader.origin,
    )


def _is_read(graph: Graph, name: str, reader: int) -> bool:
    """Whether anybody but that reader needs ``name`` in memory."""
    return name in graph.output_names or any(user != reader for user in graph.users[name])


def _positions(
    made: dict[str, Write], loads: set[ex.Load], nest: Nest, axes: tuple[Axis, ...]
) -> dict[sympy.Symbol, sympy.Expr] | None:
    """The reader's variables by those of the scan, if both go through the same dense memory."""
    load = next(iter(sorted(loads, key=lambda load: load.buffer)), None)
    if load is None:
        return None
    theirs, ours = by_memory(load.index[0], nest.axes), by_memory(made[load.buffer].address, axes)
    return None if theirs is None or ours is None else image(theirs, ours)


def _moved(
    made: dict[str, Write], nest: Nest, mapping: dict[sympy.Symbol, sympy.Expr], ranges: dict[sympy.Symbol, Size]
) -> tuple[Write, ...] | None:
    """The reader's writes at a position of the scan; None if one reads the scan at another position."""
    known: dict[str, ex.Expr] = {}

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if isinstance(node, ex.Local):
            return known.get(node.name)
        if isinstance(node, ex.Load) and node.buffer in made:
            write = made[node.buffer]
            return ex.to(write.expr, node.dtype) if node.index[0] == write.address else None
        return None

    def here(root: ex.Expr) -> ex.Expr:
        return ex.transform(tidy(ex.substitute(root, mapping), ranges), leaf)

    writes: list[Write] = []
    for stmt in nest.body:
        if isinstance(stmt, Let):
            known[stmt.name] = here(stmt.expr)
        elif isinstance(stmt, Write):
            address = simplify(stmt.address.xreplace(mapping), ranges)
            writes.append(replace(stmt, address=address, expr=here(stmt.expr)))
    left = {load.buffer for w in writes for load in ex.loads(w.expr)}
    return None if left & set(made) else tuple(writes)
