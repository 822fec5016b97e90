"""A scan written down as a kernel of its own: its outer positions around one ordered loop.

Where memory runs along the scanned axis, each outer position is one loop; where it runs along another axis, that axis
is the lanes and all of them step together.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import flatten_index, product, simplify
from dcompile.ir.kernel import Kernel, Let, Nest, Role, ScanLoop, Stmt, Write
from dcompile.ir.nodes import Axis, Scan
from dcompile.ir.types import Size
from dcompile.schedule.emit import PARALLEL_WORK
from dcompile.schedule.loops import flatten_loads, index_parts, step_key, steps_as_one


def scan_kernel(graph: Graph, node: Scan) -> Kernel:
    """The kernel of one scan; it writes every result."""
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
