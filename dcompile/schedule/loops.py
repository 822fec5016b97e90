"""One loop node brought to the form fusion compares: flat addresses, few axes, and its image in another domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import FloorDiv, Mod, flatten_index, product, replaced, simplify, symbol, unflatten
from dcompile.ir.nodes import Axis, Pointwise, Reduction, Store
from dcompile.ir.types import Size
from dcompile.schedule.inline import tidy

Single: TypeAlias = Pointwise | Reduction | Store
"""Loop nodes that fusion groups: one address for everything they write."""


@dataclass(frozen=True)
class Form:
    """A loop node over as few axes as its addresses allow.

    Attributes:
        axes, raxes: parallel and reduced axes, outermost first.
        expr: body with flat addresses.
        address: where the result goes, in elements of the written value; for a reduction over ``axes`` only.
        bind: data-dependent parts of ``address``.
        others: further operands of a reduction, with flat addresses.
    """

    node: Single
    axes: tuple[Axis, ...]
    raxes: tuple[Axis, ...]
    expr: ex.Expr
    address: sympy.Expr
    bind: tuple[ex.Expr, ...] = ()
    others: tuple[ex.Expr, ...] = ()

    def map(self, change: Callable[[ex.Expr], ex.Expr], address: Callable[[sympy.Expr], sympy.Expr]) -> Form:
        """The same form of changed expressions, at a changed address."""
        return replace(
            self,
            expr=change(self.expr),
            address=address(self.address),
            bind=tuple(change(b) for b in self.bind),
            others=tuple(change(e) for e in self.others),
        )

    @property
    def numel(self) -> Size:
        return product(tuple(size for _, size in self.axes))

    @property
    def reduced(self) -> Size:
        return product(tuple(size for _, size in self.raxes))


def form_of(graph: Graph, node: Single) -> Form:
    """Flatten the addresses of ``node``, order its axes by the strides of its result, and merge neighbours."""
    raxes = node.raxes if isinstance(node, Reduction) else ()
    ranges = dict(node.axes + raxes)
    expr = flatten_loads(graph, node.expr, ranges)
    bind = tuple(flatten_loads(graph, b, ranges) for b in node.bind) if isinstance(node, Store) else ()
    others = tuple(flatten_loads(graph, e, ranges) for e in node.others) if isinstance(node, Reduction) else ()
    position = node.index if isinstance(node, Store) else tuple(var for var, _ in node.axes)
    address = simplify(flatten_index(position, node.out.stride), ranges)
    walked = _walked(expr, address) if bind else address
    axes = tuple(sorted(_real(node.axes), key=lambda axis: step_key(walked, axis[0])))
    form = Form(node, axes, _real(raxes), expr, address, bind, others)
    form = _drop_ones(form, ranges)
    return _merge(_merge(form, "axes"), "raxes")


def flatten_loads(graph: Graph, root: ex.Expr, ranges: dict[sympy.Symbol, Size]) -> ex.Expr:
    """``root`` with each load's position turned into one address, in elements from the value's first."""

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if not isinstance(node, ex.Load):
            return None
        flat = simplify(flatten_index(node.index, graph.value(node.buffer).stride), ranges)
        return ex.load(node.buffer, (flat,), node.dtype, node.bind)

    return tidy(ex.transform(root, leaf), ranges)


def _walked(expr: ex.Expr, address: sympy.Expr) -> sympy.Expr:
    """The address a scattering loop is ordered by: that of the values it reads, as where they go depends on data."""
    direct = [load.index[0] for load in ex.loads(expr) if not load.bind]
    return max(direct, key=lambda at: len(at.free_symbols), default=address)


def _real(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple((var, size) for var, size in axes if size != 1)


def _drop_ones(form: Form, ranges: dict[sympy.Symbol, Size]) -> Form:
    zero = {var: sympy.Integer(0) for var, size in ranges.items() if size == 1}
    if not zero:
        return form
    return _substitute(form, dict(zero))


def step_key(address: sympy.Expr, var: sympy.Symbol) -> tuple[int, int]:
    step = coefficient(address, var)
    return (0, 0) if step is None or step == 0 or not step.is_Integer else (1, -int(step))


@lru_cache(maxsize=65536)
def coefficient(address: sympy.Expr, var: sympy.Symbol) -> sympy.Expr | None:
    """By how much ``address`` grows with ``var``; None where that is not constant."""
    if var not in address.free_symbols:
        return sympy.Integer(0)
    step = address.coeff(var)
    return None if var in step.free_symbols or var in (address - step * var).expand().free_symbols else step


def addresses(form: Form) -> list[sympy.Expr]:
    """Every index expression of the form, those inside data-dependent positions included."""
    parts = (part for root in (form.expr, *form.others, *form.bind) for part in index_parts(root))
    return list(dict.fromkeys((form.address, *parts)))


def index_parts(root: ex.Expr) -> list[sympy.Expr]:
    """Every index expression of ``root``, those inside data-dependent positions included."""
    found: list[sympy.Expr] = []
    for node in ex.walk(root):
        if isinstance(node, ex.Load):
            found += node.index
        elif isinstance(node, ex.Index):
            found.append(node.expr)
    return found


def _merge(form: Form, which: str) -> Form:
    """Merge neighbouring axes that every address steps through as one."""
    axes = list(form.axes if which == "axes" else form.raxes)
    at = len(axes) - 2
    while at >= 0:
        (outer, outer_size), (inner, inner_size) = axes[at], axes[at + 1]
        if all(steps_as_one(a, outer, inner, inner_size) for a in addresses(form)):
            form = _substitute(form, {outer: sympy.Integer(0)})
            axes[at : at + 2] = [(inner, product((outer_size, inner_size)))]
        at -= 1
    return replace(form, axes=tuple(axes)) if which == "axes" else replace(form, raxes=tuple(axes))


@lru_cache(maxsize=65536)
def steps_as_one(address: sympy.Expr, outer: sympy.Symbol, inner: sympy.Symbol, inner_size: Size) -> bool:
    free = address.free_symbols
    if outer not in free and inner not in free:
        return True
    big, small = coefficient(address, outer), coefficient(address, inner)
    return big is not None and small is not None and sympy.expand(big - small * inner_size) == 0


def _substitute(form: Form, mapping: dict[sympy.Symbol, sympy.Expr]) -> Form:
    pairs = tuple(mapping.items())
    return form.map(lambda e: ex.substitute(e, mapping), lambda address: replaced(address, pairs))


@dataclass(frozen=True)
class Domain:
    """The iteration space of a kernel: ``outer`` positions, and for each of them ``inner`` ones."""

    outer: tuple[Size, ...]
    inner: tuple[Size, ...] = ()

    @property
    def outer_axes(self) -> tuple[Axis, ...]:
        return tuple((symbol(f"p{n}"), size) for n, size in enumerate(self.outer))

    @property
    def inner_axes(self) -> tuple[Axis, ...]:
        return tuple((symbol(f"r{n}"), size) for n, size in enumerate(self.inner))


@dataclass(frozen=True)
class Placed:
    """A form rewritten to the variables of a domain (``p0..`` outer, ``r0..`` inner)."""

    form: Form
    expr: ex.Expr
    address: sympy.Expr
    bind: tuple[ex.Expr, ...]
    others: tuple[ex.Expr, ...] = ()

    @property
    def roots(self) -> tuple[ex.Expr, ...]:
        """Every expression that is evaluated."""
        return (self.expr, *self.others, *self.bind)


def place(form: Form, domain: Domain, spread: str) -> Placed | None:
    """``form`` in ``domain``; None where its addresses would need division or modulo by an innermost variable.

    Args:
        spread: ``"row"``: the form's axes cover outer x inner; ``"outer"``: they cover outer alone; ``"fold"``: its
            axes cover outer and its reduced axes cover inner; ``"strip"``: its axes cover the first outer axis and
            inner, its reduced axes the other outer axes.
    """
    mapping: dict[sympy.Symbol, sympy.Expr] = {}
    if spread == "row":
        pairs = [(form.axes, domain.outer_axes + domain.inner_axes)]
    elif spread == "outer":
        pairs = [(form.axes, domain.outer_axes)]
    elif spread == "strip":
        pairs = [(form.axes, domain.outer_axes[:1] + domain.inner_axes), (form.raxes, domain.outer_axes[1:])]
    else:
        pairs = [(form.axes, domain.outer_axes), (form.raxes, domain.inner_axes)]
    for own, target in pairs:
        found = image(own, target)
        if found is None:
            return None
        mapping.update(found)
    ranges = dict(domain.outer_axes + domain.inner_axes)
    moved = _substitute(form, mapping).map(lambda e: tidy(e, ranges), lambda address: simplify(address, ranges))
    result = Placed(form, moved.expr, moved.address, moved.bind, moved.others)
    fast = [axes[-1][0] for axes in (domain.outer_axes if not domain.inner else (), domain.inner_axes) if axes]
    before = any(a.has(FloorDiv, Mod) for a in addresses(form))
    if not before and any(_divides_by(a, fast) for a in addresses(moved)):
        return None
    return result


@lru_cache(maxsize=65536)
def image(own: tuple[Axis, ...], target: tuple[Axis, ...]) -> dict[sympy.Symbol, sympy.Expr] | None:
    """Each own variable as an expression of the target's, both enumerating the same row-major positions."""
    sizes = tuple(size for _, size in own)
    if sizes == tuple(size for _, size in target):
        return {var: t for (var, _), (t, _) in zip(own, target, strict=True)}
    if sympy.expand(product(sizes) - product(tuple(size for _, size in target))) != 0:
        return None
    flat: sympy.Expr = sympy.Integer(0)
    for var, size in target:
        flat = flat * size + var
    flat = sympy.expand(flat)
    ranges = dict(target)
    return {var: simplify(at, ranges) for (var, _), at in zip(own, unflatten(flat, sizes), strict=True)}


def _divides_by(address: sympy.Expr, fast: list[sympy.Symbol]) -> bool:
    return any(atom.free_symbols & set(fast) for atom in address.atoms(FloorDiv, Mod))
