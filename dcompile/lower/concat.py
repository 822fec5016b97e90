"""Concatenation. Three forms: one loop with a choice of part, a flat pack, or the library's copy loop."""

from __future__ import annotations

from typing import Any

from dcompile.ir.expr import Expr, const, index, load, masked, op, to
from dcompile.ir.index import as_expr, product
from dcompile.ir.nodes import Pack, Ref
from dcompile.ir.types import DType, Size, Value, contiguous_stride
from dcompile.lower.builder import Lowering, loop_index
from dcompile.lower.collective import contiguous
from dcompile.lower.table import NoRule, rule
from dcompile.lower.view import reshape_index

MAX_CHOICES = 8
"""Parts one loop chooses between. Every element tests its position against each part, so that cost grows with the
number of parts while a copy loop's does not."""


def _outermost(out: Value, dim: int) -> bool:
    """Whether the parts lie one after another in memory."""
    return all(n == 1 for n in out.shape[:dim]) and out.stride == contiguous_stride(out.shape)


def _packed(b: Lowering, parts: list[Value], out: Value) -> Value:
    flat = b.temp("flat", out.dtype, (product(out.shape),), out.device)
    parts = [contiguous(b, part) for part in parts]
    b.emit(Pack(out=flat, parts=tuple(part.name for part in parts), origin=b.origin))
    return b.view(out, flat, reshape_index(flat.shape, out.shape, b.sizes))


def _chosen(b: Lowering, parts: list[Value], out: Value, dim: int) -> Value:
    here = loop_index(out.shape)
    total: Expr = const(0, out.dtype)
    spans: list[tuple[Value, Size, Size]] = []
    start: Size = 0
    for part in parts:
        spans.append((part, start, start + part.shape[dim]))
        start = start + part.shape[dim]
    position = index(here[dim])
    for part, first, end in reversed(spans):
        inside: Expr | None = op("ge", position, index(as_expr(first))) if first != 0 else None
        if end != out.shape[dim]:
            below = op("lt", position, index(as_expr(end)))
            inside = below if inside is None else op("and", inside, below)
        where = tuple(
            as_expr(0) if part.shape[d] == 1 and d == dim else var - first if d == dim else var
            for d, var in enumerate(here)
        )
        total = masked(inside or const(True, DType.BOOL), to(load(part.name, where, part.dtype), out.dtype), total)
    return b.pointwise(out, total)


def concatenate(b: Lowering, parts: list[Value], out: Value, dim: int) -> Value:
    """``parts``, none of them empty, side by side along ``dim``."""
    if len(parts) == 1:
        return b.pointwise(out, b.element(parts[0], out.shape))
    same = all(part.dtype is out.dtype for part in parts)
    if same and _outermost(out, dim):
        return _packed(b, parts, out)
    if len(parts) <= MAX_CHOICES:
        return _chosen(b, parts, out, dim)
    return b.library(out, "aten.cat.default", (tuple(Ref(part.name) for part in parts), dim))


@rule("cat")
def cat(b: Lowering, tensors: Any, dim: Any = 0) -> Value:
    out = b.out
    dim = int(dim) % max(len(out.shape), 1)
    parts = [x for x in tensors if not any(n == 0 for n in x.shape)]  # an empty part adds nothing, of any shape
    if not parts:
        return b.pointwise(out, const(0, out.dtype))
    return concatenate(b, parts, out, dim)


@rule("stack")
def stack(b: Lowering, tensors: Any, dim: Any = 0) -> Value:
    out = b.out
    dim = int(dim) % len(out.shape)
    if len(tensors) > MAX_CHOICES and not _outermost(out, dim):
        raise NoRule
    parts = []
    for n, x in enumerate(tensors):
        shape = (*x.shape[:dim], 1, *x.shape[dim:])
        stride = (*x.stride[:dim], 1, *x.stride[dim:])
        lifted = Value(b.fresh(f"{b.node.name}_part{n}"), x.dtype, shape, stride, x.device)
        here = list(loop_index(shape))
        del here[dim]
        parts.append(b.view(lifted, x, tuple(here)))
    return concatenate(b, parts, out, dim)
