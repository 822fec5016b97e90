"""Cumulative ops: inclusive scans along one dimension.

On devices without a scan printer these stay library calls. Sums and products of floats run in double precision on the
CPU, as eager's do, and are rounded once an element; on a GPU in the type that eager's run in there.
"""

from __future__ import annotations

from typing import Any

from dcompile.ir.combine import neutral
from dcompile.ir.combine import rule as combine
from dcompile.ir.expr import Const, Expr, index, load, to
from dcompile.ir.nodes import Scan
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import Lowering, loop_axes, loop_index
from dcompile.lower.table import NoRule, rule

SCAN_DEVICES = frozenset({"cpu", "cuda"})
"""Devices whose printer knows scans."""

_KINDS = {"cumsum": "sum", "cumprod": "prod", "logcumsumexp": "logaddexp", "cummax": "cummax", "cummin": "cummin"}


def emit_scan(
    b: Lowering,
    outs: tuple[Value, ...],
    dim: int,
    exprs: tuple[Expr, ...],
    rules: tuple[Expr, ...],
    start: tuple[Const, ...] = (),
) -> tuple[Value, ...]:
    """``outs[i0, ...]`` = scan of ``exprs`` along ``dim``; over at most one element it is that element."""
    shape = outs[0].shape
    if shape[dim] in (0, 1):
        return tuple(b.pointwise(out, e) for out, e in zip(outs, exprs, strict=True))
    axes = loop_axes(shape)
    b.emit(Scan(outs=outs, axes=axes, along=axes[dim][0], exprs=exprs, combine=rules, start=start, origin=b.origin))
    return outs


def _accumulated(out: Value) -> DType:
    """Double precision on the CPU; on a GPU, where that is slow, the compute type, as eager's."""
    if not out.dtype.is_float:
        return out.dtype
    return DType.F64 if out.device == "cpu" else out.dtype.compute


def _element(b: Lowering, x: Value, dtype: DType) -> Expr:
    return to(load(x.name, loop_index(x.shape), x.dtype), dtype)


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(b: Lowering, x: Value, dim: Any, *, dtype: Any = None) -> Value:
    out = b.out
    name = str(b.node.target).split(".")[1]
    if not out.shape:
        return b.pointwise(out, to(load(x.name, (), x.dtype), out.dtype))
    if x.device not in SCAN_DEVICES or out.dtype.is_complex:
        raise NoRule
    inner = _accumulated(out)
    value = to(_element(b, x, out.dtype), inner)
    kind = _KINDS[name]
    return emit_scan(b, (out,), int(dim) % len(out.shape), (value,), combine(kind, inner), neutral(kind, inner))[0]


@rule("cummax", "cummin")
def running_best(b: Lowering, x: Value, dim: Any) -> tuple[Value, Value]:
    outs = (b.out_at(0), b.out_at(1))
    name = str(b.node.target).split(".")[1]
    if not x.shape:
        b.pointwise(outs[0], load(x.name, (), x.dtype))
        b.pointwise(outs[1], index(0))
        return outs
    if x.device not in SCAN_DEVICES:
        raise NoRule
    dim = int(dim) % len(x.shape)
    inner = x.dtype.compute
    axes = loop_axes(x.shape)
    entering = (_element(b, x, inner), index(axes[dim][0]) if x.shape[dim] != 1 else index(0))
    emit_scan(b, outs, dim, entering, combine(name, inner), neutral(name, inner))
    return outs
