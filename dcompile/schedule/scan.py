"""A scan written down as a kernel of its own: its outer positions around one ordered loop.

Where memory runs along the scanned axis, each outer position is one loop; where it runs along another axis, that axis
is the lanes and all of them step together. On a GPU a long loop of few positions is cut into tiles that run side by
side and tell each other what they come to. How far a tile looks back depends on timing, and with it the order in which
floats are added: the last bits of long running sums may differ from run to run, as the library's on a GPU do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import FloorDiv, as_expr, as_size, flatten_index, product, simplify, symbol
from dcompile.ir.kernel import Kernel, Let, Nest, Role, ScanLoop, Stmt, Tiles, Write
from dcompile.ir.nodes import Axis, Scan
from dcompile.ir.tiles import state_words
from dcompile.ir.types import DType, Size, Value
from dcompile.schedule.emit import PARALLEL_WORK
from dcompile.schedule.loops import flatten_loads, index_parts, step_key, steps_as_one
from dcompile.schedule.stages import has_hints, processor_of

TILE_ELEMENTS = 4096
"""Results of one tile of a scan along memory, 16 in each of 256 threads; half of it if they are wider than 4 bytes."""

COLUMN_TILE = 256
"""Rows of a tile of a scan across memory, beside the columns of one program."""

WHOLE = 16384
"""Longest loop that is not cut: as long as the longest row that a program holds in registers at once."""

LANES = 16
"""Columns that one program scans side by side; as ``codegen.triton_launch.COLUMN_WIDTH`` has them at least."""


def scan_kernels(graph: Graph, node: Scan, ctx: Context) -> tuple[Kernel, ...]:
    """The kernel of one scan, which writes every result; before it one that clears the words its tiles talk through,
    if it is cut."""
    whole = _scan_kernel(graph, node)
    length = _tile(graph, node, whole, ctx)
    if length is None:
        return (whole,)
    ctx.verdict("split", node.outs[0].name, f"tiles of {length}", "a long scan of few rows")
    return _cut(graph, node, whole, length)


def _tile(graph: Graph, node: Scan, whole: Kernel, ctx: Context) -> int | None:
    """How long tiles are that fill the GPU; None where whole rows do or the scan is short."""
    processor = processor_of(node.outs[0].device, ctx)
    if not processor.multiprocessors or not has_hints(graph, node.axes):
        return None
    total = hint(product(tuple(size for _, size in node.axes)), graph.size_hints)
    length = hint(dict(node.axes)[node.along], graph.size_hints)
    lanes = _nest_roles(whole)[-1:] == (Role.SIMD,)
    rows = total // max(length, 1)
    if length <= WHOLE // (LANES if lanes else 1) or rows > processor.multiprocessors * (LANES if lanes else 1):
        return None
    if lanes:
        return COLUMN_TILE
    wide = len(node.outs) > 1 or node.exprs[0].dtype.itemsize > 4
    return TILE_ELEMENTS // 2 if wide else TILE_ELEMENTS


def _nest_roles(kernel: Kernel) -> tuple[Role, ...]:
    (body,) = kernel.body
    return body.roles if isinstance(body, Nest) else ()


def _cut(graph: Graph, node: Scan, whole: Kernel, length: int) -> tuple[Kernel, Kernel]:
    """The kernel that clears the words, and ``whole`` in tiles that talk through them."""
    extent = dict(node.axes)[node.along]
    rows = product(tuple(size for var, size in node.axes if var != node.along))
    tiles = -(-extent // length) if isinstance(extent, int) else as_size(FloorDiv(as_expr(extent + length - 1), length))
    words = state_words([e.dtype for e in node.exprs], rows, tiles)
    stem = f"{node.outs[0].name}_tiles"
    while stem in graph.defs:
        stem += "_"
    before = Value(stem, DType.I64, (words,), (1,), node.outs[0].device)
    after = Value(f"{stem}_told", DType.I64, (words,), (1,), node.outs[0].device)
    word = symbol("i0")
    clear = Nest(((word, words),), (Role.SIMD,), (Write(before.name, word, ex.const(0, DType.I64)),))
    (body,) = whole.body
    loop = body.body[0] if isinstance(body, Nest) else body
    assert isinstance(loop, ScanLoop)
    cut: Stmt = replace(loop, tiles=Tiles(length, after.name))
    if isinstance(body, Nest):
        cut = replace(body, body=(cut,))
    return (
        Kernel(outs=(before,), body=(clear,), targets=(None,), origin=node.origin),
        replace(whole, outs=(*whole.outs, after), targets=(*whole.targets, before.name), body=(cut,)),
    )


def _scan_kernel(graph: Graph, node: Scan) -> Kernel:
    form = _Form.of(graph, node)
    axis = next(axis for axis in form.axes if axis[0] == node.along)
    names = tuple(f"{out.name}_run" for out in node.outs)
    writes = tuple(
        Write(out.name, address, ex.to(ex.local(name, entering.dtype), out.dtype))
        for out, address, name, entering in zip(node.outs, form.addresses, names, form.exprs, strict=True)
    )
    outer = tuple(a for a in form.axes if a[0] != node.along)
    lets = tuple(Let(f"{name}_in", entering) for name, entering in zip(names, form.exprs, strict=True))
    entering = tuple(ex.local(let.name, let.expr.dtype) for let in lets)
    body: Stmt = ScanLoop(axis, names, entering, node.combine, node.start, lets, writes)
    if outer:
        body = Nest(outer, _roles(graph, form, outer, node.along), (body,))
    return Kernel(outs=node.outs, body=(body,), targets=(None,) * len(node.outs), origin=node.origin)


def _roles(graph: Graph, form: _Form, outer: tuple[Axis, ...], along: sympy.Symbol) -> tuple[Role, ...]:
    """Threads over outer positions where there is work for them, lanes where memory runs along an outer axis."""
    work: Size = product(tuple(size for _, size in form.axes))
    big = hint(work, graph.size_hints) >= PARALLEL_WORK
    lanes = form.axes[-1][0] != along
    leading = (Role.PARALLEL if big else Role.SERIAL,) * len(outer)
    return (*leading[:-1], Role.SIMD) if lanes else leading


@dataclass(frozen=True)
class _Form:
    """A scan over as few axes as its addresses allow, outermost first by the strides of its first result."""

    axes: tuple[Axis, ...]
    exprs: tuple[ex.Expr, ...]
    addresses: tuple[sympy.Expr, ...]

    @staticmethod
    def of(graph: Graph, node: Scan) -> _Form:
        ranges = dict(node.axes)
        exprs = tuple(flatten_loads(graph, e, ranges) for e in node.exprs)
        position = tuple(var for var, _ in node.axes)
        addresses = tuple(simplify(flatten_index(position, out.stride), ranges) for out in node.outs)
        axes = tuple(sorted(node.axes, key=lambda axis: step_key(addresses[0], axis[0])))
        ones = {var: sympy.Integer(0) for var, size in axes if size == 1 and var != node.along}
        form = _Form(tuple(a for a in axes if a[0] not in ones), exprs, addresses)._substitute(ones)
        return form._merged(node.along)

    def _substitute(self, mapping: dict[sympy.Symbol, sympy.Expr]) -> _Form:
        if not mapping:
            return self
        exprs = tuple(ex.substitute(e, mapping) for e in self.exprs)
        return _Form(self.axes, exprs, tuple(a.xreplace(mapping) for a in self.addresses))

    def _merged(self, along: sympy.Symbol) -> _Form:
        """Neighbouring axes that every address steps through as one become one; the scanned axis stays itself."""
        form = self
        for at in reversed(range(len(self.axes) - 1)):
            (outer, outer_size), (inner, inner_size) = form.axes[at : at + 2]
            parts = [*form.addresses, *(part for e in form.exprs for part in index_parts(e))]
            if along in (outer, inner) or not all(steps_as_one(p, outer, inner, inner_size) for p in parts):
                continue
            axes = (*form.axes[:at], (inner, product((outer_size, inner_size))), *form.axes[at + 2 :])
            form = _Form(axes, form.exprs, form.addresses)._substitute({outer: sympy.Integer(0)})
        return form
