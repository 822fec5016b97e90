"""Views: index maps into the base. Whether a view can alias its base is decided later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from dcompile.ir.expr import load
from dcompile.ir.index import FloorDiv, Mod, as_expr, flatten_index, product, simplify, unflatten
from dcompile.ir.nodes import Axis
from dcompile.ir.types import Size, Value, contiguous_stride
from dcompile.lower.builder import ZERO, Lowering, loop_axes, loop_index
from dcompile.lower.sizes import Sizes
from dcompile.lower.table import NoRule, rule

# reshape -------------------------------------------------------------------------------------------------------------


def _same(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - b) == 0)


def _groups(old: Sequence[Size], new: Sequence[Size], sizes: Sizes) -> list[tuple[list[int], list[int]]] | None:
    """Cut both shapes, from the innermost dimension, into runs of equal element count.

    Dimensions of size 1 belong to no run. None when the cut cannot be seen.
    """
    olds = [d for d, n in enumerate(old) if n != 1]
    news = [d for d, n in enumerate(new) if n != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while olds and news:
        left, right = [olds.pop()], [news.pop()]
        a, b = old[left[0]], new[right[0]]
        while not _same(a, b):
            if sizes.hint(a) <= sizes.hint(b):
                if not olds:
                    return None
                left.insert(0, olds.pop())
                a = a * old[left[0]]
            else:
                if not news:
                    return None
                right.insert(0, news.pop())
                b = b * new[right[0]]
        groups.append((left, right))
    return None if olds or news else groups


def reshape_index(old: Sequence[Size], new: Sequence[Size], sizes: Sizes) -> tuple[sympy.Expr, ...]:
    """Where in shape ``old`` the element at ``(i0, i1, …)`` of shape ``new`` lies, row-major.

    Runs of dimensions with equal element counts are mapped by themselves: a merge gives ``i // n`` and ``i % n``, a
    split gives ``n * i0 + i1``; only what cannot be cut goes through the flat position.
    """
    axes = loop_axes(new)
    groups = _groups(old, new, sizes)
    if groups is None:
        groups = [(list(range(len(old))), list(range(len(new))))]
    index: list[sympy.Expr] = [ZERO] * len(old)
    for left, right in groups:
        if len(left) == len(right) == 1:
            index[left[0]] = axes[right[0]][0]
            continue
        for dim, where in zip(left, _through_flat([old[d] for d in left], [axes[d] for d in right]), strict=True):
            index[dim] = where
    return tuple(index)


def _through_flat(old: list[Size], axes: list[Axis]) -> list[sympy.Expr]:
    inner = tuple(n for _, n in axes)
    flat = flatten_index(tuple(var for var, _ in axes), contiguous_stride(inner))
    if len(old) == 1:
        return [flat]
    found = unflatten(flat, tuple(old))
    return list(found) if len(axes) == 1 else [simplify(where, dict(axes)) for where in found]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", any_dtype=True)
def view(b: Lowering, x: Value, *_: Any) -> Value:
    out = b.out
    if any(n == 0 for n in out.shape):
        return b.view(out, x, (ZERO,) * len(x.shape))  # nothing is ever read
    return b.view(out, x, reshape_index(x.shape, out.shape, b.sizes))


# one dimension to one dimension --------------------------------------------------------------------------------------


def _dim(dim: Any, rank: int) -> int:
    return int(dim) % rank if rank else 0


@rule("expand", "expand_copy", any_dtype=True)
def expand(b: Lowering, x: Value, size: Any, implicit: bool = False) -> Value:
    out = b.out
    if out.shape == x.shape:
        return x
    here = loop_index(out.shape)[len(out.shape) - len(x.shape) :]
    return b.view(out, x, tuple(ZERO if n == 1 else var for var, n in zip(here, x.shape, strict=True)))


def _permuted(b: Lowering, x: Value, order: Sequence[int]) -> Value:
    """Dimension ``k`` of the result is dimension ``order[k]`` of ``x``."""
    index = [ZERO] * len(x.shape)
    for var, dim in zip(loop_index(b.out.shape), order, strict=True):
        index[dim] = var
    return b.view(b.out, x, tuple(index))


@rule("permute", "permute_copy", any_dtype=True)
def permute(b: Lowering, x: Value, dims: Any) -> Value:
    return _permuted(b, x, [_dim(d, len(x.shape)) for d in dims])


@rule("t", "t_copy", any_dtype=True)
def t(b: Lowering, x: Value) -> Value:
    return _permuted(b, x, list(reversed(range(len(x.shape)))))


@rule("transpose.int", "transpose_copy.int", any_dtype=True)
def transpose(b: Lowering, x: Value, dim0: Any, dim1: Any) -> Value:
    order = list(range(len(x.shape)))
    if order:
        first, second = _dim(dim0, len(order)), _dim(dim1, len(order))
        order[first], order[second] = order[second], order[first]
    return _permuted(b, x, order)


@rule("unsqueeze", any_dtype=True)
def unsqueeze(b: Lowering, x: Value, dim: Any) -> Value:
    here = list(loop_index(b.out.shape))
    del here[_dim(dim, len(x.shape) + 1)]
    return b.view(b.out, x, tuple(here))


@rule("squeeze", "squeeze.dim", "squeeze.dims", any_dtype=True)
def squeeze(b: Lowering, x: Value, dim: Any = None) -> Value:
    rank = len(x.shape)
    chosen = range(rank) if dim is None else [_dim(d, rank) for d in (dim if isinstance(dim, tuple) else (dim,))]
    if len(b.out.shape) == rank:
        return x
    here = iter(loop_index(b.out.shape))
    return b.view(b.out, x, tuple(ZERO if d in chosen and n == 1 else next(here) for d, n in enumerate(x.shape)))


@rule("alias", "detach", "lift_fresh", any_dtype=True)
def alias(b: Lowering, x: Value) -> Value:
    return x


# parts ---------------------------------------------------------------------------------------------------------------


def _from(b: Lowering, out: Value, x: Value, dim: int, start: Size, step: Size = 1) -> Value:
    index = list(loop_index(out.shape))
    index[dim] = sympy.sympify(index[dim] * step + start)
    return b.view(out, x, tuple(index))


def clamped_start(start: Any, size: Size, sizes: Sizes) -> Size:
    """First position of a slice: None is 0, negative counts from the end, and never beyond the end."""
    if start is None:
        return 0
    if sizes.hint(start) < 0:
        start = start + size
        return 0 if sizes.hint(start) < 0 else start
    return size if sizes.hint(start) > sizes.hint(size) else start


@rule("slice.Tensor", any_dtype=True)
def slice_(b: Lowering, x: Value, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Value:
    dim = _dim(dim, len(x.shape))
    if b.depends_on_data(start):
        raise NoRule
    first = clamped_start(start, x.shape[dim], b.sizes)
    if first == 0 and step == 1 and _same(b.out.shape[dim], x.shape[dim]):
        return x
    return _from(b, b.out, x, dim, first, step)


@rule("select.int", any_dtype=True)
def select(b: Lowering, x: Value, dim: Any, position: Any) -> Value:
    dim = _dim(dim, len(x.shape))
    size = x.shape[dim]
    if b.depends_on_data(position):
        for fact in ((-size, "<=", position), (position, "<", size)):
            b.check(fact, f"index out of range: a position in dimension {dim} of {size} elements")
        where: Size = Mod(position, as_expr(size))  # counts a negative one from the end
    else:
        where = position + size if b.sizes.hint(position) < 0 else position
    index = list(loop_index(b.out.shape))
    index.insert(dim, sympy.sympify(where))
    return b.view(b.out, x, tuple(index))


def _pieces(b: Lowering, x: Value, dim: Any) -> tuple[Value, ...]:
    dim = _dim(dim, len(x.shape))
    start: Size = 0
    found = []
    for position in range(len(b.outs)):
        out = b.out_at(position)
        found.append(_from(b, out, x, dim, start))
        start = start + out.shape[dim]
    return tuple(found)


@rule("split.Tensor", "split_with_sizes", "split.sizes", "chunk", any_dtype=True)
def split(b: Lowering, x: Value, sizes: Any, dim: Any = 0) -> tuple[Value, ...]:
    return _pieces(b, x, dim)


@rule("unbind.int", any_dtype=True)
def unbind(b: Lowering, x: Value, dim: Any = 0) -> tuple[Value, ...]:
    dim = _dim(dim, len(x.shape))
    found = []
    for position in range(len(b.outs)):
        index = list(loop_index(b.out_at(position).shape))
        index.insert(dim, sympy.Integer(position))
        found.append(b.view(b.out_at(position), x, tuple(index)))
    return tuple(found)


@rule("diagonal", any_dtype=True)
def diagonal(b: Lowering, x: Value, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> Value:
    first, second = _dim(dim1, len(x.shape)), _dim(dim2, len(x.shape))
    *others, along = loop_index(b.out.shape)
    rest = iter(others)
    shift = {first: max(-offset, 0), second: max(offset, 0)}
    return b.view(b.out, x, tuple(along + shift[d] if d in shift else next(rest) for d in range(len(x.shape))))


@rule("unfold", any_dtype=True)
def unfold(b: Lowering, x: Value, dim: Any, size: Any, step: Any) -> Value:
    if not x.shape:
        return b.view(b.out, x, ())
    *index, inner = loop_index(b.out.shape)
    dim = _dim(dim, len(x.shape))
    index[dim] = index[dim] * step + inner
    return b.view(b.out, x, tuple(index))


@rule("as_strided", any_dtype=True)
def as_strided(b: Lowering, x: Value, size: Any, stride: Any, storage_offset: Any = None) -> Value:
    """Strides over a dense row-major base; anything else is a library call."""
    source: Any = b.node.args[0]
    meta = source.meta["val"] if hasattr(source, "meta") else None
    held = b.sizes.size(meta.storage_offset()) if meta is not None else 0
    offset = 0 if storage_offset is None else storage_offset - held
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if x.stride != contiguous_stride(x.shape) or not all(isinstance(v, int) for v in (offset, last, *x.shape)):
        raise NoRule
    if any(n == 0 for n in b.out.shape):
        return b.view(b.out, x, (ZERO,) * len(x.shape))
    if offset < 0 or last >= product(x.shape):
        raise NoRule
    flat = flatten_index(loop_index(b.out.shape), tuple(stride)) + offset
    ranges = dict(loop_axes(b.out.shape))
    return b.view(b.out, x, tuple(simplify(where, ranges) for where in unflatten(flat, x.shape)))


# rearranged copies ---------------------------------------------------------------------------------------------------


def _gathered(b: Lowering, x: Value, index: Sequence[sympy.Expr]) -> Value:
    return b.pointwise(b.out, load(x.name, tuple(index), x.dtype))


@rule("resize")
def resize(b: Lowering, x: Value, size: Any, memory_format: Any = None) -> Value:
    """A dense tensor given another shape of as many elements; other sizes show memory that nobody wrote."""
    if (
        memory_format is not None
        or x.stride != contiguous_stride(x.shape)
        or not _same(product(x.shape), product(size))
    ):
        raise NoRule
    return _gathered(b, x, reshape_index(x.shape, b.out.shape, b.sizes))


@rule("flip")
def flip(b: Lowering, x: Value, dims: Any) -> Value:
    index = list(loop_index(x.shape))
    for dim in (_dim(d, len(x.shape)) for d in dims):
        if x.shape[dim] != 1:
            index[dim] = x.shape[dim] - 1 - index[dim]
    return _gathered(b, x, index)


@rule("roll")
def roll(b: Lowering, x: Value, shifts: Any, dims: Any = ()) -> Value:
    if not dims:
        raise NoRule
    index = list(loop_index(x.shape))
    for shift, dim in zip(shifts, (_dim(d, len(x.shape)) for d in dims), strict=True):
        n = x.shape[dim]
        if not isinstance(n, int) or not isinstance(shift, int):
            raise NoRule
        if n > 1:
            index[dim] = Mod(index[dim] + (-shift) % n, sympy.Integer(n))
    return _gathered(b, x, index)


@rule("repeat")
def repeat(b: Lowering, x: Value, repeats: Any) -> Value:
    here = loop_index(b.out.shape)[len(b.out.shape) - len(x.shape) :]
    times = repeats[len(repeats) - len(x.shape) :]
    index = [
        ZERO if n in (0, 1) else var if k == 1 else Mod(var, sympy.sympify(n))
        for var, n, k in zip(here, x.shape, times, strict=True)
    ]
    return _gathered(b, x, index)


@rule("repeat_interleave.self_int")
def repeat_interleave(b: Lowering, x: Value, repeats: Any, dim: Any = None, output_size: Any = None) -> Value:
    if dim is None:
        raise NoRule
    index = list(loop_index(b.out.shape))
    dim = _dim(dim, len(x.shape))
    index[dim] = FloorDiv(index[dim], sympy.sympify(repeats))
    return _gathered(b, x, index)
