"""Pooling over windows of two and three dimensions: averages are sums, maxima also say where they were.

Positions of a window that lie outside the tensor (padding, and the last window under ``ceil_mode``) are never read. In
the gradient of an average every input position sums over the windows it belongs to, so nothing is added atomically.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from dcompile.ir.expr import Expr, bound, const, index, load, masked, op, to
from dcompile.ir.index import FloorDiv, Mod, product, unflatten
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType, Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index, reduce_axes
from dcompile.lower.indexing import wrapped
from dcompile.lower.scatter import conjunction
from dcompile.lower.table import NoRule, rule

Indices = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Windows:
    """Windows of constant size along one dimension.

    Attributes:
        size: extent of the pooled dimension.
    """

    size: Size
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    def position(self, window: sympy.Expr, step: sympy.Expr) -> sympy.Expr:
        """Where in the input the ``step``-th element of a window is; may be outside."""
        return window * self.stride + step * self.dilation - self.padding

    def inside(self, window: sympy.Expr, step: sympy.Expr) -> list[Expr]:
        """Conditions for that element to exist."""
        at = self.position(window, step)
        found = [op("lt", index(at), index(self.size))]
        return [op("ge", index(at), const(0, DType.I64)), *found] if self.padding else found


def _parts(shape: Sequence[Size], rank: int) -> tuple[Indices, Indices]:
    """The loop position, split into leading dimensions and pooled ones."""
    here = loop_index(shape)
    return here[: len(here) - rank], here[len(here) - rank :]


def _steps(counts: Sequence[Size]) -> tuple[tuple[Axis, ...], Indices]:
    axes = reduce_axes(counts)
    return axes, tuple(ZERO if count == 1 else var for var, count in axes)


def _rank(b: Lowering) -> int:
    """Number of pooled dimensions, from the op's name."""
    return 3 if "3d" in str(b.node.target) else 2


# averages ------------------------------------------------------------------------------------------------------------


def _span(w: Windows, window: sympy.Expr, count_padding: bool) -> Expr:
    """Number of elements of a window that an average divides by along one dimension."""
    start = index(window * w.stride - w.padding)
    end = op("minimum", index(window * w.stride - w.padding + w.kernel), index(w.size + w.padding))
    if count_padding:
        return op("sub", end, start)
    start = op("maximum", start, const(0, DType.I64))
    return op("sub", op("minimum", end, index(w.size)), start)


def _divisor(windows: list[Windows], at: Indices, count_padding: bool, override: Any, dtype: DType) -> Expr:
    if override is not None:
        return const(override, dtype)
    found: Expr | None = None
    for w, window in zip(windows, at, strict=True):
        span = _span(w, window, count_padding)
        found = span if found is None else op("mul", found, span)
    assert found is not None
    return to(found, dtype)


@rule("avg_pool2d", "avg_pool3d")
def avg_pool(
    b: Lowering,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Value:
    out, dtype = b.out, b.out.dtype.compute
    windows = _windows_of(b, x, kernel, stride, padding)
    lead, at = _parts(out.shape, len(windows))
    axes, steps = _steps([w.kernel for w in windows])
    total = b.temp("sum", dtype, out.shape, out.device)
    b.reduction(total, "sum", axes, _window_element(x, windows, lead, at, steps, dtype, 0))
    divisor = _divisor(windows, at, count_include_pad, divisor_override, dtype)
    return b.pointwise(out, op("div" if dtype.is_float else "truncdiv", b.element(total, out.shape), divisor))


def _windows_of(b: Lowering, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any = (1,)) -> list[Windows]:
    rank = _rank(b)
    sizes = x.shape[len(x.shape) - rank :]

    def each(values: Any) -> list[int]:
        found = [v for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, int)]
        if len(found) not in (1, rank):
            raise NoRule
        return found * rank if len(found) == 1 else found

    kernel = each(kernel)
    stride = each(stride) if stride not in ((), None) else kernel
    return [Windows(*part) for part in zip(sizes, kernel, stride, each(padding), each(dilation), strict=True)]


def _window_element(
    x: Value, windows: list[Windows], lead: Indices, at: Indices, steps: Indices, dtype: DType, outside: float
) -> Expr:
    """One element of a window, ``outside`` where there is none."""
    conditions = [c for w, o, r in zip(windows, at, steps, strict=True) for c in w.inside(o, r)]
    where = tuple(w.position(o, r) for w, o, r in zip(windows, at, steps, strict=True))
    body = to(load(x.name, (*lead, *where), x.dtype), dtype)
    return masked(conjunction(conditions), body, const(outside, dtype))


@rule("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool_backward(
    b: Lowering,
    grad: Value,
    x: Value,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Any,
) -> Value:
    """Every input position sums over the windows that contain it: window = (position + padding - step) / stride."""
    out, dtype = b.out, b.out.dtype.compute
    windows = _windows_of(b, x, kernel, stride, padding)
    rank = len(windows)
    lead, at = _parts(out.shape, rank)
    axes, steps = _steps([w.kernel for w in windows])
    conditions, where = [], []
    for w, i, r, count in zip(windows, at, steps, grad.shape[len(grad.shape) - rank :], strict=True):
        first = sympy.expand(i + w.padding - r)
        window = FloorDiv(first, sympy.Integer(w.stride)) if w.stride != 1 else first
        if w.stride != 1:
            conditions.append(op("eq", index(Mod(first, sympy.Integer(w.stride))), const(0, DType.I64)))
        conditions += [op("ge", index(window), const(0, DType.I64)), op("lt", index(window), index(count))]
        where.append(window)
    divisor = _divisor(windows, tuple(where), count_include_pad, divisor_override, dtype)
    share = op("div", to(load(grad.name, (*lead, *where), grad.dtype), dtype), divisor)
    return b.reduction(out, "sum", axes, masked(conjunction(conditions), share, const(0, dtype)))


# maxima --------------------------------------------------------------------------------------------------------------


def _lowest(dtype: DType) -> float:
    if dtype.is_float:
        return -math.inf
    return 0 if dtype is DType.U8 else -(2 ** (8 * dtype.itemsize - 1))


def _maxima(b: Lowering, x: Value, axes: tuple[Axis, ...], element: Expr) -> Value:
    b.reduction(b.out_at(0), "max", axes, element)
    place = b.temp("place", DType.I64, b.out_at(0).shape, x.device)
    return b.reduction(place, "argmax", axes, element)


def _flat(at: Sequence[Expr], sizes: Sequence[Size]) -> Expr:
    flat = at[0]
    for position, size in zip(at[1:], sizes[1:], strict=True):
        flat = op("add", op("mul", flat, index(size)), position)
    return flat


def _unpacked(place: Expr, counts: Sequence[int]) -> list[Expr]:
    """The steps along each dimension of a row-major position in a window."""
    found: list[Expr] = []
    for count in reversed(counts[1:]):
        found.append(op("mod", place, const(count, DType.I64)))
        place = op("floordiv", place, const(count, DType.I64))
    return [place, *reversed(found)]


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(
    b: Lowering,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    dilation: Any = (1,),
    ceil_mode: bool = False,
) -> tuple[Value, Value]:
    """Maxima, and their positions in the flattened pooled dimensions."""
    windows = _windows_of(b, x, kernel, stride, padding, dilation)
    rank, out = len(windows), b.out_at(0)
    lead, at = _parts(out.shape, rank)
    axes, steps = _steps([w.kernel for w in windows])
    dtype = x.dtype
    place = _maxima(b, x, axes, _window_element(x, windows, lead, at, steps, dtype, _lowest(dtype)))
    found: list[Expr] = []
    unpacked = _unpacked(b.element(place, out.shape), [w.kernel for w in windows])
    for w, window, step in zip(windows, at, unpacked, strict=True):
        start = index(window * w.stride - w.padding)
        where = op("add", start, op("mul", step, const(w.dilation, DType.I64)))
        # a window of nothing but -inf names its first position, which may lie in the padding
        first = index(sympy.expand(window * w.stride - w.padding + w.dilation * sympy.Max(0, _missing(w, window))))
        found.append(op("where", op("lt", where, const(0, DType.I64)), first, where) if w.padding else where)
    b.pointwise(b.out_at(1), _flat(found, [w.size for w in windows]))
    return out, b.out_at(1)


def _missing(w: Windows, window: sympy.Expr) -> sympy.Expr:
    """How many elements of a window lie before the tensor; negative where none does."""
    return FloorDiv(w.padding - window * w.stride + w.dilation - 1, sympy.Integer(w.dilation))


@rule("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool_backward(
    b: Lowering,
    grad: Value,
    x: Value,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    places: Value,
) -> Value:
    return _write_at_places(b, grad, places, x.shape, "add")


@rule("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward")
def adaptive_max_pool_backward(b: Lowering, grad: Value, x: Value, places: Value) -> Value:
    return _write_at_places(b, grad, places, x.shape, "add")


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(b: Lowering, x: Value, places: Value, size: Any, stride: Any = (), padding: Any = ()) -> Value:
    return _write_at_places(b, x, places, b.out.shape, "set")


def _write_at_places(b: Lowering, grad: Value, places: Value, shape: tuple[Size, ...], mode: str) -> Value:
    """Zeros, and every element of ``grad`` where its maximum was. 16-bit floats add up in f32."""
    out, rank = b.out, _rank(b)
    wide = out.dtype.compute if mode == "add" else out.dtype
    sums = Value(b.fresh(f"{b.node.name}_zeros"), wide, out.shape, out.stride, out.device)
    b.pointwise(sums, const(0, wide))
    here = loop_index(grad.shape)
    plane = shape[-rank:]
    bind = (wrapped(load(places.name, here, places.dtype), product(plane)),)
    where = (*here[: len(here) - rank], *unflatten(bound(0), plane))
    row = to(load(grad.name, here, grad.dtype), wide)
    if wide is out.dtype:
        return b.store(sums, grad.shape, where, row, bind, mode, name=out.name)
    summed = b.store(sums, grad.shape, where, row, bind, mode)
    return b.pointwise(out, b.element(summed, out.shape))


# windows whose borders follow from the output's size -----------------------------------------------------------------


@dataclass(frozen=True)
class Adaptive:
    """Window ``o`` covers positions ``floor(o * size / count)`` to ``ceil((o + 1) * size / count)`` of a dimension."""

    size: int
    count: int

    @property
    def longest(self) -> int:
        """Elements of the longest window."""
        return max((self.end(o) - self.start(o) for o in range(self.count)), default=0)

    @property
    def most(self) -> int:
        """Windows the most shared position belongs to."""
        return max(-((-(i + 1) * self.count) // self.size) - i * self.count // self.size for i in range(self.size))

    def start(self, o: Any) -> Any:
        return o * self.size // self.count if isinstance(o, int) else FloorDiv(o * self.size, self.count)

    def end(self, o: Any) -> Any:
        up = (o + 1) * self.size + self.count - 1
        return up // self.count if isinstance(o, int) else FloorDiv(sympy.expand(up), self.count)


def _adaptive(sizes: Sequence[Size], counts: Sequence[Size]) -> list[Adaptive]:
    """
    Raises:
        NoRule: symbolic sizes, whose longest window is unknown, or none.
    """
    if not all(isinstance(n, int) and n > 0 for n in (*sizes, *counts)):
        raise NoRule
    return [Adaptive(int(n), int(m)) for n, m in zip(sizes, counts, strict=True)]


def _adaptive_element(
    x: Value, windows: list[Adaptive], lead: Indices, at: Indices, steps: Indices, dtype: DType, outside: float
) -> Expr:
    where = [w.start(o) + r for w, o, r in zip(windows, at, steps, strict=True)]
    uneven = [(w, o, i) for w, o, i in zip(windows, at, where, strict=True) if w.size % w.count]
    conditions = [op("lt", index(i), index(w.end(o))) for w, o, i in uneven]
    body = to(load(x.name, (*lead, *where), x.dtype), dtype)
    return masked(conjunction(conditions), body, const(outside, dtype))


def _adaptive_count(windows: list[Adaptive], at: Sequence[sympy.Expr], dtype: DType) -> Expr:
    found: Expr | None = None
    for w, o in zip(windows, at, strict=True):
        length = index(w.end(o) - w.start(o)) if w.size % w.count else const(w.size // w.count, DType.I64)
        found = length if found is None else op("mul", found, length)
    assert found is not None
    return to(found, dtype)


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_avg_pool(b: Lowering, x: Value, counts: Any) -> Value:
    out, dtype, rank = b.out, b.out.dtype.compute, _rank(b)
    windows = _adaptive(x.shape[-rank:], out.shape[-rank:])
    lead, at = _parts(out.shape, rank)
    axes, steps = _steps([w.longest for w in windows])
    total = b.temp("sum", dtype, out.shape, out.device)
    b.reduction(total, "sum", axes, _adaptive_element(x, windows, lead, at, steps, dtype, 0))
    return b.pointwise(out, op("div", b.element(total, out.shape), _adaptive_count(windows, at, dtype)))


@rule("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def adaptive_avg_pool_backward(b: Lowering, grad: Value, x: Value) -> Value:
    """Position i belongs to the windows from ``floor(i * count / size)`` to ``ceil((i + 1) * count / size)``."""
    out, dtype, rank = b.out, b.out.dtype.compute, _rank(b)
    windows = _adaptive(x.shape[-rank:], grad.shape[-rank:])
    lead, at = _parts(out.shape, rank)
    axes, steps = _steps([w.most for w in windows])
    back = [Adaptive(w.count, w.size) for w in windows]
    where = [w.start(i) + r for w, i, r in zip(back, at, steps, strict=True)]
    conditions = [op("lt", index(o), index(w.end(i))) for w, i, o in zip(back, at, where, strict=True)]
    body = to(load(grad.name, (*lead, *where), grad.dtype), dtype)
    share = op("div", body, _adaptive_count(windows, where, dtype))
    return b.reduction(out, "sum", axes, masked(conjunction(conditions), share, const(0, dtype)))


@rule("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(b: Lowering, x: Value, counts: Any) -> tuple[Value, Value]:
    rank, out = _rank(b), b.out_at(0)
    windows = _adaptive(x.shape[-rank:], out.shape[-rank:])
    lead, at = _parts(out.shape, rank)
    longest = [w.longest for w in windows]
    axes, steps = _steps(longest)
    place = _maxima(b, x, axes, _adaptive_element(x, windows, lead, at, steps, x.dtype, _lowest(x.dtype)))
    unpacked = _unpacked(b.element(place, out.shape), longest)
    found = [op("add", index(w.start(o)), step) for w, o, step in zip(windows, at, unpacked, strict=True)]
    b.pointwise(b.out_at(1), _flat(found, [w.size for w in windows]))
    return out, b.out_at(1)
