"""Numbers that a program learns while it runs: sizes that depend on data, values read from tensors, and their checks.

A size symbol is known from the start (``graph.SizeInput``, or the extent of an input), or a library call learns it
(``Extern.binds``): the call returns the number itself, or a tensor whose shape holds it, possibly inside an expression
such as ``2*u0``. Every later node that uses the symbol depends on that call and on the checks of the symbol before.

A check is ``extern dcompile.check(left, relation, right, message) effect``. It reads no memory and is never removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import sympy

from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import FloorDiv, symbol
from dcompile.ir.kernel import Fold, Kernel, Nest, ScanLoop, Write, expressions, statements
from dcompile.ir.nodes import Extern, Loop, Node, Ref, Store, View, loop_axes
from dcompile.ir.types import Number, Size, Value

if TYPE_CHECKING:
    from dcompile.ir.graph import Graph

CHECK = "dcompile.check"
LAUNCH = "dcompile.launch"
"""The launch of a Triton kernel of the user's own: (kernel, grids, arguments by name)."""
RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
}
"""How the two sides of a check may stand to each other."""


@dataclass(frozen=True)
class Source:
    """Where the value of a symbol is found in what a library call returns.

    Attributes:
        out: the tensor; None for the returned number itself.
        kind: ``"size"``, ``"stride"``, or ``"number"``.
        dim: dimension of the tensor.
        known: the entry of the shape (strides) there, an expression of the symbol.
        solved: the symbol, given ``measured()`` for the entry.
    """

    out: Value | None
    kind: str
    dim: int
    known: Size
    solved: sympy.Expr


MEASURED = symbol("measured")
"""Stands for the measured entry in ``Source.solved``."""


def is_check(node: Node) -> TypeGuard[Extern]:
    return isinstance(node, Extern) and node.op == CHECK


def is_library_call(node: Node) -> TypeGuard[Extern]:
    """Whether ``node`` counts as a call into a library: not a check, nor the look-up of a packed weight."""
    return isinstance(node, Extern) and node.op != CHECK and not node.op.startswith("dcompile.pack_")


def reads_numbers(node: Node) -> bool:
    """Whether ``node`` brings a number from a tensor to the host."""
    return isinstance(node, Extern) and (bool(node.binds) or any(_has_item(a) for a in (*node.args, *node.kwargs)))


def _has_item(arg: object) -> bool:
    if isinstance(arg, tuple):
        return any(_has_item(item) for item in arg)
    return isinstance(arg, Ref) and arg.item


def solve(entry: sympy.Expr, unknown: sympy.Symbol) -> sympy.Expr | None:
    """``unknown`` where ``entry`` has the value ``MEASURED``: for ``a*unknown + b``, a not 0; None for other forms.

    The division is exact for the values the entry can take; that the entry comes out as measured is the caller's check.
    """
    step = sympy.expand(entry.subs(unknown, unknown + 1) - entry)
    if step == 0 or step.has(unknown) or step.has(sympy.Function):
        return None
    rest = sympy.expand(entry - step * unknown)
    return MEASURED - rest if step == 1 else FloorDiv(MEASURED - rest, step)


def find(number: Number, node: Extern) -> Source | None:
    """Where ``node`` tells the value of ``number``: the first entry that can be solved, sizes first; None if none."""
    unknown = symbol(number.name)
    if number.at is not None:
        return Source(None, "number", number.at, unknown, MEASURED)
    for kind in ("size", "stride"):
        for out in (*node.outs, *node.versions):
            for dim, entry in enumerate(() if out is None else out.shape if kind == "size" else out.stride):
                if not isinstance(entry, int) and entry.has(unknown) and _others_known(entry, number, node):
                    solved = solve(entry, unknown)
                    if solved is not None:
                        return Source(out, kind, dim, entry, solved)
    return None


def _others_known(entry: sympy.Expr, number: Number, node: Extern) -> bool:
    """Whether the other symbols of ``entry`` are known before ``number`` is: bound earlier, or earlier by this call."""
    later = [other.name for other in node.binds][[n.name for n in node.binds].index(number.name) + 1 :]
    return not any(s.name in later for s in entry.free_symbols)


def symbols_of(node: Node) -> frozenset[sympy.Symbol]:
    """Every symbol in the sizes and indices of ``node``, loop variables included."""
    found: set[sympy.Symbol] = set()
    for item in node.defs:
        for value in (item,) if isinstance(item, Value) else getattr(item, "results", ()):
            _sizes((*value.shape, *value.stride), found)
    _sizes(node.extra_sizes, found)
    if isinstance(node, Loop):
        _sizes((size for _, size in loop_axes(node)), found)
        for root in node.exprs:
            _expression(root, found)
    if isinstance(node, Store):
        _sizes(node.index, found)
        for bound in node.bind:
            _expression(bound, found)
    elif isinstance(node, View):
        _sizes((*node.index, *(size for _, size in node.axes)), found)
    elif isinstance(node, Extern):
        for arg in (*node.args, *(value for _, value in node.kwargs)):
            _argument(arg, found)
    elif isinstance(node, Kernel):
        _kernel(node, found)
    return frozenset(found)


def _kernel(node: Kernel, found: set[sympy.Symbol]) -> None:
    for stmt in statements(node.body):
        if isinstance(stmt, Nest | Fold | ScanLoop):
            _sizes((size for _, size in stmt.axes), found)
        elif isinstance(stmt, Write):
            _sizes((stmt.address,), found)
    for root in expressions(node.body):
        _expression(root, found)


def _sizes(sizes: Iterable[Size], found: set[sympy.Symbol]) -> None:
    for size in sizes:
        if not isinstance(size, int):
            found.update(size.free_symbols)


def _expression(root: ex.Expr, found: set[sympy.Symbol]) -> None:
    for part in ex.walk(root):
        if isinstance(part, ex.Index):
            found.update(part.expr.free_symbols)
        elif isinstance(part, ex.Load):
            _sizes(part.index, found)


def _argument(arg: object, found: set[sympy.Symbol]) -> None:
    if isinstance(arg, sympy.Expr):
        found.update(arg.free_symbols)
    elif isinstance(arg, tuple):
        for item in arg:
            _argument(item, found)


def learned(graph: Graph) -> dict[str, int]:
    """Position of the node that learns each number, by the symbol's name."""
    return {
        item.name: position
        for position, node in enumerate(graph.nodes)
        if isinstance(node, Extern)
        for item in node.binds
    }


def check_numbers(graph: Graph) -> None:
    """Every number is learned before it is used, and can be found where its call says.

    Raises:
        CompilerBug: naming the symbol and the node.
    """
    waiting = set(learned(graph))
    if not waiting:
        return
    for node in graph.nodes:
        if isinstance(node, Extern):
            for number in node.binds:
                if find(number, node) is None:
                    raise CompilerBug(f"{graph.name}: {node.op} at {node.origin.source} does not tell {number.name}")
                waiting.discard(number.name)
        if early := sorted({s.name for s in symbols_of(node)} & waiting):
            what = f"{type(node).__name__} {', '.join(d.name for d in node.defs)}"
            raise CompilerBug(f"{graph.name}: {what} uses {', '.join(early)} before the program knows it")


class Knowledge:
    """Which nodes a node must follow because of the numbers it uses, asked in program order.

    Args:
        graph: a graph in program order.
    """

    def __init__(self, graph: Graph) -> None:
        self._learned = learned(graph)
        self._checks: dict[str, list[int]] = {}

    def before(self, position: int, node: Node) -> set[int]:
        """Positions of the calls that learn what ``node`` uses, and of the checks of it so far."""
        if not self._learned:
            return set()
        used = {s.name for s in symbols_of(node)} & self._learned.keys()
        found = {self._learned[name] for name in used}
        for name in used:
            found.update(self._checks.get(name, ()))
            if is_check(node):
                self._checks.setdefault(name, []).append(position)
        found.discard(position)
        return found


def holds(node: Extern, sizes: Mapping[sympy.Symbol, int]) -> bool | None:
    """Whether a check passes for ``sizes``; None if they leave it open."""
    left, relation, right, _ = node.args
    values = [_value(side, sizes) for side in (left, right)]
    if values[0] is None or values[1] is None:
        return None
    return RELATIONS[relation](values[0], values[1])


def _value(size: Size, sizes: Mapping[sympy.Symbol, int]) -> int | None:
    if isinstance(size, int):
        return size
    value = size.xreplace({s: sympy.Integer(n) for s, n in sizes.items()})
    return int(value) if value.is_Integer else None


__all__ = [
    "CHECK", "MEASURED", "RELATIONS", "Knowledge", "Source", "check_numbers", "find", "holds", "is_check",
    "is_library_call", "learned", "reads_numbers", "solve", "symbols_of",
]  # fmt: skip
