"""Sends and receives between two ranks: library calls that nothing moves across, each ended by its wait.

PyTorch's schemas do not say that a receive writes the tensor it is given, nor that both ends use their tensors until
the wait. Here the launch writes what it receives into, and so does the wait, which also reads what was sent: memory
stays in place until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dcompile.errors import Unsupported
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.collective import contiguous, is_dense
from dcompile.lower.fallback import convert
from dcompile.lower.table import rule

FINISH = "dcompile.finish"
"""The runtime helper that waits: ``finish(result, *tensors in use until then)``."""


def _checked(b: Lowering, tensors: tuple[Value, ...], received: tuple[bool, ...]) -> tuple[Value, ...]:
    """Dense tensors: what is sent may be a copy, what is received into must be the user's own."""
    for tensor, receives in zip(tensors, received, strict=True):
        if receives and not is_dense(tensor):
            raise Unsupported(
                b.origin,
                what="a receive into a tensor that is not contiguous",
                instead="receive into a contiguous tensor and copy the result",
            )
    return tuple(t if receives else contiguous(b, t) for t, receives in zip(tensors, received, strict=True))


def _versions(b: Lowering, written: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(Value(b.fresh(f"{w.name}_new"), w.dtype, w.shape, w.stride, w.device) for w in written)


def launch(
    b: Lowering, tensors: tuple[Value, ...], received: tuple[bool, ...], args: tuple[Any, ...], seq: bool
) -> tuple[Value, ...]:
    """The call with ``args``, and what it returns: for a receive the next version of its tensor."""
    written = tuple(t for t, receives in zip(tensors, received, strict=True) if receives)
    for value in written:
        b.flights.settle(b.root(value))
    versions = _versions(b, written)
    outs = tuple(None if receives else b.out_at(n) for n, receives in enumerate(received))
    b.emit(
        Extern(
            outs=outs,
            op=str(b.node.target),
            args=convert(b, args),
            writes=tuple(w.name for w in written),
            versions=versions,
            effect=True,
            barrier=True,
            seq=seq,
            origin=b.origin,
        )
    )
    for old, new in zip(written, versions, strict=True):
        b.supersede(old, new)
    remaining = iter(versions)
    results = tuple(next(remaining) if out is None else out for out in outs)
    for result, tensor, receives in zip(results, tensors, received, strict=True):
        b.flights.sent(result, () if receives else (tensor,))
    return results


def finish_open(b: Lowering, value: Value, inputs: Sequence[Any]) -> None:
    """A wait for ``value``: ends the send or receive that gave it, or what the caller may have in flight in an input;
    for anything else there is nothing to wait for."""
    kept = b.flights.take_sent(value)
    if kept is not None or b.root(value) in inputs:
        finish(b, value, kept or ())


def finish(b: Lowering, result: Value, kept: tuple[Value, ...]) -> None:
    """Wait for the launch that gave ``result``, or whatever a caller has in flight there."""
    written = () if kept else (result,)
    versions = _versions(b, written)
    b.emit(
        Extern(
            outs=(),
            op=FINISH,
            args=tuple(Ref(value.name) for value in (result, *kept)),
            writes=tuple(w.name for w in written),
            versions=versions,
            effect=True,
            barrier=True,
            origin=b.origin,
        )
    )
    for old, new in zip(written, versions, strict=True):
        b.supersede(old, new)


@rule("_c10d_functional.isend.default", any_dtype=True)
def isend(b: Lowering, x: Value, dst: int, tag: int, group_name: Any) -> Value:
    (sent,) = _checked(b, (x,), (False,))
    return launch(b, (sent,), (False,), (sent, dst, tag, group_name), seq=False)[0]


@rule("_c10d_functional.irecv.default", any_dtype=True)
def irecv(b: Lowering, x: Value, src: int, tag: int, group_name: Any) -> Value:
    (into,) = _checked(b, (x,), (True,))
    return launch(b, (into,), (True,), (into, src, tag, group_name), seq=False)[0]


@rule("_c10d_functional.batch_p2p_ops.default", any_dtype=True)
def batch(b: Lowering, ops: Any, peers: Any, tags: Any, tensors: tuple[Value, ...], group: Any) -> tuple[Value, ...]:
    received = tuple(op == "irecv" for op in ops)
    used = _checked(b, tensors, received)
    return launch(b, used, received, (ops, peers, tags, used, group), seq=True)
