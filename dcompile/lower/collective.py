"""Functional collectives: launches become Start nodes. Waits are handled by the walk (see ``lower.flight``)."""

from __future__ import annotations

from typing import Any

import sympy

from dcompile.collectives.group import Group
from dcompile.collectives.nodes import REDUCTIONS, Kind, Pending, Start
from dcompile.collectives.rules import check_source
from dcompile.errors import Unsupported
from dcompile.ir.types import Size, Value, contiguous_stride
from dcompile.lower.builder import Lowering
from dcompile.lower.flight import InFlight
from dcompile.lower.table import rule

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd")
"""Differentiable collectives live in the second namespace before torch 2.13."""


def _ops(*names: str) -> tuple[str, ...]:
    return tuple(f"{space}.{name}.default" for space in _NAMESPACES for name in names)


def group_of(b: Lowering, name: Any, size: Any) -> Group:
    """The group slot of a process group; ``size`` is its rank count, or None where the op does not tell.

    Raises:
        Unsupported: this rank has no such group.
    """
    label = next((known for known, held in b.group_names.items() if str(held) == str(name)), None)
    if label is None:
        label = f"g{len(b.group_names)}"
        b.group_names[label] = name
    if isinstance(size, int | sympy.Expr):
        return Group(label, b.sizes.hint(size))
    try:
        return Group(label, int(b.group_size(name)))
    except Unsupported as error:  # raised where nobody knows the user's line
        raise Unsupported(b.origin, error.what, error.instead) from None


def contiguous(b: Lowering, value: Value) -> Value:
    """``value``, or a copy of it in row-major order: collectives take dense buffers."""
    if value.stride == contiguous_stride(value.shape) or is_dense(value):
        return value
    copy = b.temp(f"{value.name}_dense", value.dtype, value.shape, value.device)
    return b.pointwise(copy, b.element(value, value.shape))


def is_dense(value: Value) -> bool:
    """Row-major up to the strides of dimensions of size 1, which never matter."""
    step: Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != step:
            return False
        step = step * size
    return True


def _reduction(b: Lowering, name: Any) -> str:
    known = str(name).lower()
    known = {"mean": "avg", "prod": "product"}.get(known, known)
    if known not in REDUCTIONS:
        raise Unsupported(b.origin, f"a collective with reduction {name!r}", f"use one of {', '.join(REDUCTIONS)}")
    return known


def launch(
    b: Lowering,
    kind: Kind,
    group: Group,
    sources: tuple[Value, ...],
    reduction: str | None = None,
    root: int | None = None,
    in_place: bool = False,
    splits: tuple[tuple[Size, ...], tuple[Size, ...]] = ((), ()),
) -> Any:
    """Emit a Start of the current node; gives handles of its results, one or a tuple as the op returns them."""
    if in_place:
        for source in sources:
            if not is_dense(source):
                raise Unsupported(
                    b.origin,
                    what=f"an in-place {kind.value} of a tensor that is not contiguous",
                    instead="call .contiguous() first and copy the result back",
                )
            b.flights.settle(b.root(source))
    else:
        sources = tuple(contiguous(b, source) for source in sources)
    outs = tuple(b.out_at(n) for n in range(len(b.outs)))
    pending = Pending(b.fresh(f"{b.node.name}_pending"), outs, in_place)
    start = Start(
        pending=pending,
        kind=kind,
        group=group,
        sources=tuple(s.name for s in sources),
        reduction=reduction,
        root=root,
        in_splits=splits[0],
        out_splits=splits[1],
        origin=b.origin,
    )
    for source, out in zip(sources, outs, strict=True):
        check_source(start, out.name, source)
    b.emit(start)
    handles = b.flights.launched(start, sources)
    return handles if isinstance(b.node.meta["val"], list | tuple) else handles[0]


def _tuple(x: Any) -> tuple[Value, ...]:
    return x if isinstance(x, tuple) else (x,)


def _in_place(b: Lowering) -> bool:
    return str(b.node.target).split(".")[1].endswith("_")


@rule(*_ops("all_reduce", "all_reduce_", "all_reduce_coalesced", "all_reduce_coalesced_"))
def all_reduce(b: Lowering, x: Any, reduce_op: Any, group_name: Any) -> InFlight:
    group = group_of(b, group_name, None)
    return launch(b, Kind.ALL_REDUCE, group, _tuple(x), _reduction(b, reduce_op), in_place=_in_place(b))  # type: ignore[no-any-return]


@rule(*_ops("all_gather_into_tensor", "all_gather_into_tensor_coalesced"), any_dtype=True)
def all_gather(b: Lowering, x: Any, group_size: Any, group_name: Any) -> InFlight:
    return launch(b, Kind.ALL_GATHER, group_of(b, group_name, group_size), _tuple(x))  # type: ignore[no-any-return]


@rule(*_ops("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"))
def reduce_scatter(b: Lowering, x: Any, reduce_op: Any, group_size: Any, group_name: Any) -> InFlight:
    group = group_of(b, group_name, group_size)
    return launch(b, Kind.REDUCE_SCATTER, group, _tuple(x), _reduction(b, reduce_op))  # type: ignore[no-any-return]


@rule(*_ops("broadcast", "broadcast_"), any_dtype=True)
def broadcast(b: Lowering, x: Any, src: Any, group_name: Any) -> InFlight:
    group = group_of(b, group_name, None)
    return launch(b, Kind.BROADCAST, group, _tuple(x), root=int(src), in_place=_in_place(b))  # type: ignore[no-any-return]


@rule(*_ops("all_to_all_single"), any_dtype=True)
def all_to_all(b: Lowering, x: Value, output_splits: Any, input_splits: Any, group_name: Any) -> InFlight:
    group = group_of(b, group_name, None)
    splits = (tuple(input_splits), tuple(output_splits))
    if _equal_shares(splits[0], x, group.size) and splits[0] == splits[1]:
        splits = ((), ())
    start: InFlight = launch(b, Kind.ALL_TO_ALL, group, (x,), splits=splits)
    return start


def _equal_shares(splits: tuple[Size, ...], x: Value, ranks: int) -> bool:
    """Whether every rank gets the same number of rows and all rows are sent; no splits mean just that."""
    if not splits:
        return True
    same = len(splits) == ranks and all(rows == splits[0] for rows in splits)
    return bool(same and x.shape and sympy.expand(splits[0] * ranks - x.shape[0]) == 0)
