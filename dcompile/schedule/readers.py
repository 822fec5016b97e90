"""What it takes for a kernel to be computed together with the node whose result it reads element by element."""

from __future__ import annotations

import sympy

from dcompile.analyse.dependence import predecessors
from dcompile.ir.graph import Graph
from dcompile.ir.index import as_expr
from dcompile.ir.kernel import Kernel, Let, Nest, Write
from dcompile.ir.nodes import Axis
from dcompile.schedule.loops import coefficient


def place(graph: Graph, at: int, reader: int) -> bool | None:
    """Whether both together can stand where the reader stands (True), where the node stands (False), or nowhere."""
    before = predecessors(graph)
    behind = {at}
    for n in range(at + 1, reader):
        if behind & before[n]:
            behind.add(n)
    if len(behind) == 1:
        return True
    return None if any(at < n for n in before[reader]) else False


def elementwise(kernel: Kernel) -> Nest | None:
    """The nest of a kernel that computes every position by itself and writes it to a place that is known beforehand."""
    nest = kernel.body[0] if len(kernel.body) == 1 else None
    if not isinstance(nest, Nest) or not all(isinstance(s, Let | Write) for s in nest.body):
        return None
    return None if any(isinstance(s, Write) and (s.mode != "set" or s.bind) for s in nest.body) else nest


def by_memory(address: sympy.Expr, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """``axes`` in the order in which ``address`` counts through dense memory with them; None if it does not."""
    steps = [(coefficient(address, var), (var, size)) for var, size in axes]
    if any(step is None or not step.is_Integer or step <= 0 for step, _ in steps):
        return None
    ordered = tuple(axis for _, axis in sorted(steps, key=lambda item: -int(item[0] or 0)))
    return ordered if sympy.expand(address - flat(ordered)) == 0 else None


def flat(axes: tuple[Axis, ...]) -> sympy.Expr:
    """The row-major position of ``axes``."""
    found: sympy.Expr = sympy.Integer(0)
    for var, size in axes:
        found = found * as_expr(size) + var
    return sympy.expand(found)


__all__ = ["by_memory", "elementwise", "flat", "place"]
