"""Which values share memory, and where in it they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import sympy

from dcompile.analyse.remember import once_a_graph
from dcompile.collectives.nodes import Pending, Start, Wait
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph
from dcompile.ir.index import as_expr, as_size, simplify
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Store, View
from dcompile.ir.types import Size, Value


@dataclass(frozen=True)
class Strided:
    """A view as plain strides over a base.

    Attributes:
        base: a value that is not a View's; it owns the address the view counts from.
        shape: sizes of the view.
        stride: elements of the base's dtype between neighbours, never negative. A dimension of size 1 has the stride
            its ``Value`` states.
        offset: elements from the base value's first element to the view's first element.
    """

    base: str
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size


@dataclass(frozen=True)
class _Address:
    """Where element ``axes`` of a view lies, in elements from the first element of ``base``."""

    base: str
    axes: tuple[tuple[sympy.Symbol, Size], ...]
    expr: sympy.Expr


def strided_views(graph: Graph) -> dict[str, Strided | None]:
    """Every View's result, resolved through chains of Views, by name.

    None means the result cannot be an ordinary strided tensor over its base: the composed map is not affine, or it
    runs backwards (a flip; tensors have no negative strides).
    """
    strided: dict[str, Strided | None] = {}
    addresses: dict[str, _Address] = {}
    for node in graph.nodes:
        if isinstance(node, View):
            strided[node.out.name] = _resolve(graph, node, strided, addresses)
    return strided


def _resolve(
    graph: Graph, view: View, strided: dict[str, Strided | None], addresses: dict[str, _Address]
) -> Strided | None:
    if view.base in addresses:
        under = addresses[view.base]
        inner = {var: index for (var, _), index in zip(under.axes, view.index, strict=True)}
        return _general(view, under.base, under.expr.xreplace(inner), addresses)
    below = strided.get(view.base)
    root, stride, offset = (
        (view.base, graph.value(view.base).stride, 0) if below is None else (below.base, below.stride, below.offset)
    )
    static = _static_map(view, stride, offset)
    if static is not None:
        return _strided(view, root, *static)
    terms = (index * step for index, step in zip(view.index, stride, strict=True))
    return _general(view, root, sympy.Add(as_expr(offset), *terms), addresses)


def _general(view: View, base: str, expr: sympy.Expr, addresses: dict[str, _Address]) -> Strided | None:
    """Resolve by symbolic differencing; a map that is not affine is kept in ``addresses`` for views of this view."""
    address = _Address(base, view.axes, simplify(expr, dict(view.axes)))
    affine = _affine(address.axes, address.expr)
    if any(size == 0 for size in view.out.shape):
        affine = view.out.stride, 0
    if affine is None:
        addresses[view.out.name] = address
        return None
    return _strided(view, base, *affine)


def _strided(view: View, base: str, steps: tuple[Size, ...], start: Size) -> Strided:
    shape, own = view.out.shape, view.out.stride
    if any(size == 0 for size in shape):  # no element: any strides will do, and the offset must stay in the storage
        return Strided(base, shape, own, 0)
    kept = tuple(o if size == 1 else step for size, o, step in zip(shape, own, steps, strict=True))
    return Strided(base, shape, kept, start)


def _static_map(view: View, stride: tuple[Size, ...], offset: Size) -> tuple[tuple[Size, ...], Size] | None:
    """Strides and offset when every index is a sum of integer multiples of axes and all sizes are static.

    Returns None when the general way has to be taken (which may still find the view affine).
    """
    if not isinstance(offset, int):
        return None
    steps = dict.fromkeys((var for var, _ in view.axes), 0)
    for index, step in zip(view.index, stride, strict=True):
        if not isinstance(step, int):
            return None
        for term in index.args if isinstance(index, sympy.Add) else (index,):
            factor = 1
            if isinstance(term, sympy.Mul) and len(term.args) == 2 and term.args[0].is_Integer:
                factor, term = int(term.args[0]), term.args[1]
            if term.is_Integer:
                offset += factor * int(term) * step
            elif term in steps:
                steps[term] += factor * step
            else:
                return None
    result = tuple(steps[var] for var, _ in view.axes)
    return None if any(s < 0 for s, (_, size) in zip(result, view.axes, strict=True) if size != 1) else (result, offset)


@lru_cache(maxsize=65536)
def _affine(axes: tuple[tuple[sympy.Symbol, Size], ...], address: sympy.Expr) -> tuple[tuple[Size, ...], Size] | None:
    """Strides and offset of an address by differencing; None if some step is not constant or runs backwards."""
    variables = {var for var, _ in axes}
    rest, steps = address, []
    for var, size in axes:
        step = sympy.expand(address.subs(var, 1) - address.subs(var, 0)) if size != 1 else sympy.Integer(0)
        if step.free_symbols & variables or step.is_negative:
            return None
        rest = rest - step * var
        steps.append(as_size(step))
    offset = sympy.expand(rest)
    if offset.free_symbols & variables:
        return None
    return tuple(steps), as_size(offset)


@once_a_graph
def storage_roots(graph: Graph) -> dict[str, str]:
    """Every tensor name to the name of the first value in its storage.

    Views, next versions of written operands, results of in-place collectives and library outputs that alias an operand
    are followed. A View that is not affine counts as sharing its base's storage.

    Raises:
        CompilerBug: an operand is not defined before its use, or a wait names no launch.
    """
    roots = {name: name for name in graph.input_names}
    starts: dict[str, Start] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            starts[node.pending.name] = node
        for name, shared in shared_storage(node, starts):
            if shared is not None and shared not in roots:
                raise CompilerBug(f"{graph.name}: {name} shares the storage of {shared}, which is not defined before")
            roots[name] = name if shared is None else roots[shared]
    return roots


def shared_storage(node: Node, starts: dict[str, Start]) -> Iterator[tuple[str, str | None]]:
    """For each tensor ``node`` brings into being: its name and the operand whose storage it shares, None if fresh.

    ``starts`` maps the pendings launched so far to their launches. The results of an out-of-place collective exist
    from its Start on.

    Raises:
        CompilerBug: a wait names no launch, or defines another number of tensors than the launch has.
    """
    if isinstance(node, View):
        yield node.out.name, node.base
    elif isinstance(node, Store):
        yield node.out.name, node.target
    elif isinstance(node, Kernel):
        for n, out in enumerate(node.outs):
            yield out.name, node.targets[n] if node.targets else None
    elif isinstance(node, Extern):
        for n, result in enumerate(node.outs):
            if result is not None:
                yield result.name, node.aliases[n] if node.aliases else None
        for version, written in zip(node.versions, node.writes, strict=True):
            yield version.name, written
    elif isinstance(node, Start):
        if not node.pending.in_place:
            for result in node.pending.results:
                yield result.name, None
    elif isinstance(node, Wait):
        if node.pending not in starts:
            raise CompilerBug(f"wait on {node.pending}, which no start launches")
        start = starts[node.pending]
        if not len(node.outs) == len(start.pending.results) == len(start.sources):
            raise CompilerBug(f"wait on {node.pending} gives {len(node.outs)} tensors for {len(start.sources)} sources")
        shared = start.sources if start.pending.in_place else (None,) * len(node.outs)
        for out, source in zip(node.outs, shared, strict=True):
            yield out.name, source
    else:
        for item in node.defs:
            if not isinstance(item, Pending):
                yield item.name, None


@dataclass(frozen=True)
class Footprint:
    """The bytes a value can touch.

    Attributes:
        root: its storage (see ``storage_roots``).
        start, stop: half-open byte range counted from the root value's first element; None when not known statically,
            then the whole storage is meant.
    """

    root: str
    start: int | None = None
    stop: int | None = None

    def overlaps(self, other: Footprint) -> bool:
        """Whether the two may share a byte."""
        if self.root != other.root:
            return False
        if self.start is None or self.stop is None or other.start is None or other.stop is None:
            return True
        return self.start < other.stop and other.start < self.stop


@once_a_graph
def footprints(graph: Graph) -> dict[str, Footprint]:
    """The footprint of every tensor name.

    Sub-ranges are known for static strided views and for next versions of them; library outputs that alias an
    operand, symbolic sizes and views that are not affine cover their whole storage.
    """
    views = strided_views(graph)
    starts: dict[str, Start] = {}
    found: dict[str, Footprint] = {}
    for item in graph.inputs:
        if isinstance(item, Value):
            found[item.name] = _whole(item, item.name)
    for node in graph.nodes:
        if isinstance(node, Start):
            starts[node.pending.name] = node
        aliased = {a for a in node.aliases if a} if isinstance(node, Extern) else set()
        for name, shared in shared_storage(node, starts):
            value = _result(node, name)
            if shared is None:
                found[name] = _whole(value, name)
            elif isinstance(node, View):
                found[name] = _part(value, views[name], found)
                if views[name] is None:
                    found[name] = Footprint(found[shared].root)
            elif shared in aliased:
                found[name] = Footprint(found[shared].root)
            else:
                found[name] = found[shared]
    return found


def _result(node: Node, name: str) -> Value:
    items = node.pending.results if isinstance(node, Start) else node.defs
    return next(item for item in items if isinstance(item, Value) and item.name == name)


def _whole(value: Value, root: str) -> Footprint:
    size = value.nbytes
    return Footprint(root, 0, size) if isinstance(size, int) else Footprint(root)


def _part(value: Value, view: Strided | None, found: dict[str, Footprint]) -> Footprint:
    if view is None:
        return Footprint(value.name)
    base = found[view.base]
    span = Value(value.name, value.dtype, view.shape, view.stride).nbytes
    if base.start is None or not isinstance(view.offset, int) or not isinstance(span, int):
        return Footprint(base.root)
    start = base.start + view.offset * value.dtype.itemsize
    return Footprint(base.root, start, start + span)


__all__ = ["Footprint", "Strided", "footprints", "shared_storage", "storage_roots", "strided_views"]
