"""Writes at given positions: scatter, index_put, slices written into copies, copies into inputs."""

from __future__ import annotations

from typing import Any

import sympy

from dcompile.ir.expr import Expr, bound, const, index, load, masked, op, to
from dcompile.ir.index import FloorDiv, Mod, as_expr
from dcompile.ir.types import DType, Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index
from dcompile.lower.indexing import advanced, wrapped
from dcompile.lower.table import NoRule, rule
from dcompile.lower.view import clamped_start


def scratch(b: Lowering, out: Value, suffix: str, expr: Expr) -> Value:
    """A value like ``out`` holding ``expr``, to be stored into."""
    first = Value(b.fresh(f"{b.node.name}_{suffix}"), out.dtype, out.shape, out.stride, out.device)
    return b.pointwise(first, expr)


def _copied(b: Lowering, x: Value) -> Value:
    """What the current op writes into: ``x`` itself if it works in place, else a copy."""
    return x if _in_place(b) else scratch(b, b.out, "copy", b.element(x, b.out.shape))


def _in_place(b: Lowering) -> bool:
    return str(b.node.target).split(".")[1].endswith("_")


@rule("copy_")
def copy_(b: Lowering, target: Value, source: Any, non_blocking: bool = False) -> Value:
    """Into the storage of ``target``; its later readers see the new version."""
    expr = b.element(source, target.shape, target.dtype)
    return b.store(target, target.shape, loop_index(target.shape), expr, name=b.out.name)


@rule("embedding_dense_backward")
def embedding_backward(
    b: Lowering, grad: Value, places: Value, rows: Any, padding_idx: Any, by_frequency: bool
) -> Value:
    """Rows of zeros, plus every gradient row added where it was read. Repeats of 16-bit floats add up in f32."""
    if by_frequency:
        raise NoRule
    out, wide = b.out, b.out.dtype.compute
    sums = Value(b.fresh(f"{b.node.name}_zeros"), wide, out.shape, out.stride, out.device)
    b.pointwise(sums, const(0, wide))
    *outer, _ = here = loop_index(grad.shape)
    place = load(places.name, tuple(outer), places.dtype)
    row: Expr = load(grad.name, here, grad.dtype)
    if padding_idx >= 0:
        padded = op("eq", place, const(padding_idx, place.dtype))
        row = op("where", padded, const(0, grad.dtype), row)
    target = (bound(0), here[-1])
    bind = (wrapped(place, out.shape[0]),)
    if wide is out.dtype:
        return b.store(sums, grad.shape, target, row, bind, "add", name=out.name)
    summed = b.store(sums, grad.shape, target, row, bind, "add")
    return b.pointwise(out, b.element(summed, out.shape))


# index_put -----------------------------------------------------------------------------------------------------------


@rule("index_put", "index_put_", "_unsafe_index_put")
def index_put(b: Lowering, x: Value, indices: Any, values: Value, accumulate: bool = False) -> Value:
    if accumulate and x.dtype is DType.BOOL:
        raise NoRule  # a logical or
    found = advanced(x, indices)
    expr = b.element(values, found.shape, x.dtype)
    mode = "add" if accumulate else "set"
    return b.store(_copied(b, x), found.shape, found.where, expr, found.bind, mode, name=b.out.name)


@rule("index_add", "index_add_")
def index_add(b: Lowering, x: Value, dim: Any, places: Value, source: Value, alpha: Any = 1) -> Value:
    if not x.shape or not places.shape or alpha != 1 or x.dtype is DType.BOOL or not _fitting(x, dim, places, source):
        raise NoRule
    return _index_write(b, x, dim, places, b.element(source, source.shape, x.dtype), source.shape, "add")


@rule("index_copy", "index_copy_")
def index_copy(b: Lowering, x: Value, dim: Any, places: Value, source: Value) -> Value:
    if not x.shape or not places.shape or not _fitting(x, dim, places, source):
        raise NoRule
    return _index_write(b, x, dim, places, b.element(source, source.shape, x.dtype), source.shape, "set")


def _fitting(x: Value, dim: Any, places: Value, source: Value) -> bool:
    """Whether ``source`` has a slice of ``x`` for each place, as far as sizes are known. The library reports others."""
    wanted = [places.shape[0] if d == int(dim) % len(x.shape) else n for d, n in enumerate(x.shape)]
    if len(source.shape) != len(wanted):
        return False
    pairs = zip(wanted, source.shape, strict=True)
    return all(n == m for n, m in pairs if isinstance(n, int) and isinstance(m, int))


def _index_write(
    b: Lowering, x: Value, dim: Any, places: Value, expr: Expr, shape: tuple[Size, ...], mode: str
) -> Value:
    here, dim = loop_index(shape), int(dim) % len(x.shape)
    place = wrapped(load(places.name, (here[dim],), places.dtype), x.shape[dim])
    where = tuple(bound(0) if d == dim else here[d] for d in range(len(x.shape)))
    return b.store(_copied(b, x), shape, where, expr, (place,), mode, name=b.out.name)


# scatter -------------------------------------------------------------------------------------------------------------


def _scatter(b: Lowering, x: Value, dim: Any, places: Value, source: Any, mode: str) -> Value:
    if not x.shape or len(places.shape) != len(x.shape):
        raise NoRule
    here, dim = loop_index(places.shape), int(dim) % len(x.shape)
    place = wrapped(load(places.name, here, places.dtype), x.shape[dim])
    where = tuple(bound(0) if d == dim else here[d] for d in range(len(x.shape)))
    if isinstance(source, Value):  # may be larger than the index: only its leading corner is read
        expr: Expr = to(load(source.name, here, source.dtype), x.dtype)
    else:
        expr = b.element(source, places.shape, x.dtype)
    if places.shape[dim] == 1 and _equal_but(places.shape, x.shape, dim) and not _in_place(b):
        return b.pointwise(b.out, _one_place(b, x, dim, place, expr, mode))
    return b.store(_copied(b, x), places.shape, where, expr, (place,), mode, name=b.out.name)


def _equal_but(a: tuple[Size, ...], b: tuple[Size, ...], dim: int) -> bool:
    return all(m == n for d, (m, n) in enumerate(zip(a, b, strict=True)) if d != dim)


def _one_place(b: Lowering, x: Value, dim: int, place: Expr, new: Expr, mode: str) -> Expr:
    """Element of the result where each line along ``dim`` is written at one place: a choice instead of a write.

    The gradient of a cross entropy is such a scatter into zeros, which so becomes part of the loop that reads it.
    """
    written = op("eq", index(loop_index(x.shape)[dim]), to(place, DType.I64))
    old = b.element(x, x.shape)
    return op("where", written, op("add", old, new) if mode == "add" else new, old)


@rule("scatter.src", "scatter.value", "scatter_.src", "scatter_.value")
def scatter(b: Lowering, x: Value, dim: Any, places: Value, source: Any) -> Value:
    return _scatter(b, x, dim, places, source, "set")


@rule("scatter_add", "scatter_add_")
def scatter_add(b: Lowering, x: Value, dim: Any, places: Value, source: Any) -> Value:
    if x.dtype is DType.BOOL:
        raise NoRule
    return _scatter(b, x, dim, places, source, "add")


@rule("scatter.reduce", "scatter.value_reduce", "scatter_.reduce", "scatter_.value_reduce")
def scatter_with(b: Lowering, x: Value, dim: Any, places: Value, source: Any, reduce: str) -> Value:
    if reduce != "add":
        raise NoRule
    return scatter_add(b, x, dim, places, source)


@rule("scatter_reduce.two", "scatter_reduce_.two")
def scatter_reduce(
    b: Lowering, x: Value, dim: Any, places: Value, source: Any, reduce: str, include_self: bool = True
) -> Value:
    if reduce != "sum" or not include_self:
        raise NoRule
    return scatter_add(b, x, dim, places, source)


# writes into a region of a copy --------------------------------------------------------------------------------------


def conjunction(conditions: list[Expr]) -> Expr:
    """All of them."""
    found: Expr = const(True, DType.BOOL)
    for condition in conditions:
        found = condition if found == const(True, DType.BOOL) else op("and", found, condition)
    return found


def _between(where: sympy.Expr, start: Size, end: Size, extent: Size) -> list[Expr]:
    """Conditions for ``start <= where < end`` that are not certain in a dimension of ``extent``."""
    found = []
    if start != 0:
        found.append(op("ge", index(where), index(as_expr(start))))
    if end != extent:
        found.append(op("lt", index(where), index(as_expr(end))))
    return found


def _overwritten(b: Lowering, x: Value, source: Value, conditions: list[Expr], where: tuple[sympy.Expr, ...]) -> Value:
    body = to(load(source.name, where, source.dtype), x.dtype)
    return b.pointwise(b.out, masked(conjunction(conditions), body, b.element(x, x.shape)))


@rule("slice_scatter")
def slice_scatter(
    b: Lowering, x: Value, source: Value, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Value:
    here, dim = list(loop_index(x.shape)), int(dim) % len(x.shape)
    extent = x.shape[dim]
    if b.depends_on_data(start):
        raise NoRule
    first = clamped_start(start, extent, b.sizes)
    last = first + (source.shape[dim] - 1) * step + 1
    conditions = _between(here[dim], first, last, extent)
    away = here[dim] - first
    if step != 1:
        conditions.append(op("eq", index(Mod(away, sympy.sympify(step))), const(0, DType.I64)))
        away = FloorDiv(away, sympy.sympify(step))
    if any(n == 0 for n in source.shape):
        return b.pointwise(b.out, b.element(x, x.shape))
    here[dim] = ZERO if source.shape[dim] == 1 else away
    return _overwritten(b, x, source, conditions, tuple(here))


@rule("select_scatter")
def select_scatter(b: Lowering, x: Value, source: Value, dim: Any, position: Any) -> Value:
    here, dim = list(loop_index(x.shape)), int(dim) % len(x.shape)
    where = position + x.shape[dim] if b.sizes.hint(position) < 0 else position
    condition = op("eq", index(here[dim]), index(as_expr(where)))
    del here[dim]
    return _overwritten(b, x, source, [condition], tuple(here))


@rule("diagonal_scatter")
def diagonal_scatter(b: Lowering, x: Value, source: Value, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> Value:
    here, rank = list(loop_index(x.shape)), len(x.shape)
    first, second = int(dim1) % rank, int(dim2) % rank
    along = sympy.sympify(here[first] - max(-offset, 0))
    conditions = [op("eq", index(sympy.sympify(here[second] - max(offset, 0))), index(along))]
    conditions += _between(along, 0, source.shape[-1], x.shape[first])
    if offset < 0:
        conditions.append(op("ge", index(along), const(0, DType.I64)))
    if any(n == 0 for n in source.shape):
        return b.pointwise(b.out, b.element(x, x.shape))
    others = [at for d, at in enumerate(here) if d not in (first, second)]
    return _overwritten(b, x, source, conditions, (*others, ZERO if source.shape[-1] == 1 else along))


@rule("constant_pad_nd")
def constant_pad(b: Lowering, x: Value, pad: Any, value: Any = 0) -> Value:
    """``pad`` lists (before, after) from the last dimension backwards; negative amounts cut."""
    out = b.out
    where, conditions = list(loop_index(out.shape)), []
    for k in range(len(pad) // 2):
        dim = len(x.shape) - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        position = where[dim]
        if b.sizes.hint(before) > 0:
            conditions.append(op("ge", index(position), index(as_expr(before))))
        if b.sizes.hint(after) > 0:
            conditions.append(op("lt", index(position), index(as_expr(before + x.shape[dim]))))
        where[dim] = sympy.sympify(position - before)
    filler = b.element(value, out.shape, out.dtype)
    if any(n == 0 for n in x.shape):
        return b.pointwise(out, filler)
    return b.pointwise(out, masked(conjunction(conditions), load(x.name, tuple(where), x.dtype), filler))
