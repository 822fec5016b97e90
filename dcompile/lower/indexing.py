"""Reads at data-dependent positions: embedding, gather, advanced indexing. Positions wrap once and are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from dcompile.ir.expr import Expr, bound, const, index, load, op, to
from dcompile.ir.types import DType, Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index
from dcompile.lower.table import NoRule, rule


def wrapped(position: Expr, size: Size) -> Expr:
    """A data-dependent position in a dimension of ``size``: negative counts from the end, out of range is reported."""
    limit = const(size, DType.I64) if isinstance(size, int) else index(size)
    return op("wrap_index", to(position, DType.I64), limit)


@rule("embedding")
def embedding(
    b: Lowering, weight: Value, places: Value, padding_idx: Any = -1, by_frequency: bool = False, sparse: bool = False
) -> Value:
    *outer, inner = loop_index(b.out.shape)
    place = wrapped(load(places.name, tuple(outer), places.dtype), weight.shape[0])
    return b.pointwise(b.out, load(weight.name, (bound(0), inner), weight.dtype, (place,)))


@rule("gather")
def gather(b: Lowering, x: Value, dim: Any, places: Value, sparse_grad: bool = False) -> Value:
    if not x.shape:
        return b.pointwise(b.out, load(x.name, (), x.dtype))
    here = loop_index(places.shape) if places.shape else (ZERO,)
    dim = int(dim) % len(x.shape)
    place = wrapped(load(places.name, here if places.shape else (), places.dtype), x.shape[dim])
    where = tuple(bound(0) if d == dim else here[d] for d in range(len(x.shape)))
    return b.pointwise(b.out, load(x.name, where, x.dtype, (place,)))


@rule("index_select")
def index_select(b: Lowering, x: Value, dim: Any, places: Value) -> Value:
    if not x.shape or not places.shape:
        raise NoRule
    here = loop_index(b.out.shape)
    dim = int(dim) % len(x.shape)
    place = wrapped(load(places.name, (here[dim],), places.dtype), x.shape[dim])
    where = tuple(bound(0) if d == dim else here[d] for d in range(len(x.shape)))
    return b.pointwise(b.out, load(x.name, where, x.dtype, (place,)))


@dataclass(frozen=True)
class Advanced:
    """Advanced indexing ``x[indices]``.

    Attributes:
        shape: of the result.
        where: position in ``x`` for the position ``(i0, i1, …)`` of the result; ``q0..`` stand for ``bind``.
    """

    shape: tuple[Size, ...]
    where: tuple[sympy.Expr, ...]
    bind: tuple[Expr, ...]


def _broadcast(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...]:
    rank = max(len(shape) for shape in shapes)
    found: list[Size] = [1] * rank
    for shape in shapes:
        for position, size in enumerate(shape, start=rank - len(shape)):
            if size != 1:
                found[position] = size
    return tuple(found)


def advanced(x: Value, indices: Sequence[Value | None]) -> Advanced:
    """Positions of ``x[indices]``: all index tensors broadcast together; their dimensions stand where the first of them
    stood when they are neighbours, else in front.

    Raises:
        NoRule: a mask among the indices (the result's size depends on data), or none at all.
    """
    slots = [*indices, *([None] * (len(x.shape) - len(indices)))]
    used = [d for d, place in enumerate(slots) if place is not None]
    tensors = [place for place in slots if place is not None]
    if not used or any(place.dtype is DType.BOOL or place.dtype is DType.U8 for place in tensors):
        raise NoRule
    common = _broadcast([place.shape for place in tensors])
    neighbours = used[-1] - used[0] + 1 == len(used)
    front = used[0] if neighbours else 0
    plain = [x.shape[d] for d in range(len(x.shape)) if d not in used]
    shape = (*plain[:front], *common, *plain[front:])
    here = loop_index(shape)
    inner = here[front : front + len(common)]
    rest = iter((*here[:front], *here[front + len(common) :]))
    where: list[sympy.Expr] = []
    bind: list[Expr] = []
    for d, place in enumerate(slots):
        if place is None:
            where.append(next(rest))
            continue
        lead = len(common) - len(place.shape)
        at = tuple(ZERO if n == 1 else inner[lead + k] for k, n in enumerate(place.shape))
        where.append(bound(len(bind)))
        bind.append(wrapped(load(place.name, at, place.dtype), x.shape[d]))
    return Advanced(shape, tuple(where), tuple(bind))


@rule("index.Tensor", "_unsafe_index.Tensor")
def index_tensor(b: Lowering, x: Value, indices: Any) -> Value:
    found = advanced(x, indices)
    if len(found.shape) != len(b.out.shape):
        raise NoRule
    return b.pointwise(b.out, load(x.name, found.where, x.dtype, found.bind))
