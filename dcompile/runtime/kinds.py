"""How each kind of collective is launched on ``torch.distributed``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dcompile.errors import DCompileError
from dcompile.runtime import coalesced
from dcompile.runtime import flat as fl

Splits = tuple[tuple[int, ...], tuple[int, ...]]
"""Rows of the source that go to each rank, rows of the result that come from each."""


class Launched:
    """What has been launched of a collective so far.

    Attributes:
        works: ``torch.distributed`` works to wait for.
        finish: what is left to do after the works are done (copies into planned memory, division for averages).
        keep: tensors that must stay alive until then.
    """

    __slots__ = ("finish", "keep", "works")

    def __init__(self) -> None:
        self.works: list[Any] = []
        self.finish: list[Callable[[], object]] = []
        self.keep: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a collective is asked to do.

    Attributes:
        group: the processes; ``rank`` and ``size`` are this one's number and their count.
        reduction: ``collectives.nodes.REDUCTIONS`` name for reducing kinds.
        root: sending rank within the group, for ``broadcast``.
        in_place: results are the sources.
        splits: rows to and from each rank, for ``all_to_all`` in unequal shares.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    reduction: str | None
    root: int | None
    in_place: bool
    splits: Splits | None = None


Tensors = Sequence[torch.Tensor]


def _together(request: Request, *lists: Tensors) -> bool:
    """Whether several tensors go out in one launch as they lie."""
    return (
        len(lists[0]) > 1 and coalesced.all_contiguous(*lists) and coalesced.groups_launches(request.group, lists[0][0])
    )


def _native_avg(group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    """Only NCCL averages in every supported version of PyTorch; elsewhere the sum is divided at the wait."""
    return coalesced.groups_launches(group, tensor)


def _divide(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.div_(ranks)
    return tensor.div_(ranks, rounding_mode="trunc")


def _wire(request: Request, buffer: torch.Tensor) -> tuple[torch.Tensor, Any, bool, bool]:
    """What to reduce, the backend's reduction, whether it is a copy of ``buffer``, whether to divide afterwards."""
    assert request.reduction is not None
    wire, op, copied = fl.reducible(buffer, request.reduction)
    if op != "avg" or _native_avg(request.group, wire):
        return wire, getattr(dist.ReduceOp, op.upper()), copied, False
    return wire, dist.ReduceOp.SUM, copied, True


def _typed(wire: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A received wire buffer as ``dtype``: bits for bool and complex, values for widened integers."""
    if wire.dtype is dtype:
        return wire
    return wire.view(dtype) if dtype is torch.bool or dtype.is_complex else wire.to(dtype)


def _shared_buffer(launched: Launched, sources: Tensors, results: Tensors, in_place: bool, filled: bool) -> Any:
    """The buffer that is both sent and received: the only result itself if it is contiguous, else a flat copy.

    Args:
        filled: the buffer must hold the sources.
    """
    if fl.dense(results):
        if filled and not in_place:
            results[0].copy_(sources[0])
        launched.keep += (results[0],)
        return results[0]
    buffer = fl.one_row(sources)
    if len(sources) == 1 and not in_place and buffer.data_ptr() == sources[0].data_ptr():
        buffer = buffer.clone()
    launched.keep += (buffer,)
    return buffer


def _all_reduce(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    if _together(request, results) and sources[0].dtype is not torch.int16:
        _all_reduce_together(launched, sources, results, request)
        return
    buffer = _shared_buffer(launched, sources, results, request.in_place, filled=True)
    wire, op, copied, divide = _wire(request, buffer)
    launched.keep += (wire,)
    launched.works.append(dist.all_reduce(wire, op=op, group=request.group, async_op=True))
    if divide:
        launched.finish.append(lambda: _divide(wire, request.size))
    if copied:
        launched.finish.append(lambda: buffer.view(-1).copy_(wire))
    if not fl.dense(results):
        launched.finish.append(lambda: fl.from_rows(buffer, results, 1))


def _all_reduce_together(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    if not request.in_place:
        for source, result in zip(sources, results, strict=True):
            result.copy_(source)
    wires = [_wire(request, result) for result in results]
    launched.keep += (results,)
    launched.works.append(coalesced.all_reduce(request.group, [wire for wire, *_ in wires], wires[0][1]))
    launched.finish += [partial(_divide, wire, request.size) for wire, *_, divide in wires if divide]


def _broadcast(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    assert request.root is not None
    buffer = _shared_buffer(launched, sources, results, request.in_place, filled=request.rank == request.root)
    root = dist.get_global_rank(request.group, request.root)
    launched.works.append(dist.broadcast(fl.movable(buffer), src=root, group=request.group, async_op=True))
    if not fl.dense(results):
        launched.finish.append(lambda: fl.from_rows(buffer, results, 1))


def _all_gather(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    if _together(request, results, sources):
        launched.works.append(coalesced.all_gather(request.group, results, sources))
        return
    sent = fl.one_row(sources)
    direct = fl.dense(results)
    received = results[0] if direct else sent.new_empty(sent.numel() * request.size)
    launched.keep += (sent, received)
    launched.works.append(_gather_single(fl.movable(received), fl.movable(sent), request.group))
    if not direct:
        launched.finish.append(lambda: fl.from_rows(received, results, request.size))


def _reduce_scatter(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    if _together(request, results, sources) and sources[0].dtype is not torch.int16:
        _reduce_scatter_together(launched, sources, results, request)
        return
    sent = fl.to_rows(sources, request.size)
    wire, op, _, divide = _wire(request, sent)
    direct = fl.dense(results) and wire.dtype is results[0].dtype
    received = results[0].view(-1) if direct else wire.new_empty(wire.numel() // request.size)
    launched.keep += (sent, wire, received)
    work, summed = _scatter_single(received, wire, op, request.group)
    launched.works.append(work)
    if summed is not None:
        share = received.numel()
        launched.keep += (summed,)
        launched.finish.append(lambda: received.copy_(summed[request.rank * share : (request.rank + 1) * share]))
    if divide:
        launched.finish.append(lambda: _divide(received, request.size))
    if not direct:
        launched.finish.append(lambda: fl.from_rows(_typed(received, results[0].dtype), results, 1))


def _reduce_scatter_together(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    wires = [_wire(request, source) for source in sources]
    shares = [result.view(-1).view(wire.dtype) for result, (wire, *_) in zip(results, wires, strict=True)]
    launched.works.append(coalesced.reduce_scatter(request.group, shares, [wire for wire, *_ in wires], wires[0][1]))
    if wires[0][3]:
        launched.finish += [partial(_divide, share, request.size) for share in shares]


def _all_to_all(launched: Launched, sources: Tensors, results: Tensors, request: Request) -> None:
    if request.splits is not None:
        _uneven_all_to_all(launched, sources[0], results[0], request, request.splits)
        return
    sent = fl.to_rows(sources, request.size)
    direct = fl.dense(results)
    received = results[0] if direct else torch.empty_like(sent)
    launched.keep += (sent, received)
    launched.works.append(
        dist.all_to_all_single(fl.movable(received), fl.movable(sent), group=request.group, async_op=True)
    )
    if not direct:
        launched.finish.append(lambda: fl.from_rows(received, results, request.size))


def _uneven_all_to_all(
    launched: Launched, source: torch.Tensor, result: torch.Tensor, request: Request, splits: Splits
) -> None:
    """Shares of any size. Splits count elements of flat buffers here, so that empty rows cost nothing special."""
    _check_shares("input", splits[0], source, request.size)
    _check_shares("output", splits[1], result, request.size)
    sent, received = source.contiguous(), result if result.is_contiguous() else result.new_empty(result.shape)
    launched.keep += (sent, received)
    flat, out = fl.movable(sent), fl.movable(received)
    width = math.prod(source.shape[1:]) * (source.element_size() // flat.element_size())
    shares = [[rows * width for rows in rows_of] for rows_of in splits]
    work = dist.all_to_all_single(out, flat, shares[1], shares[0], group=request.group, async_op=True)
    launched.works.append(work)
    if received is not result:
        launched.finish.append(lambda: result.copy_(received))


def _check_shares(word: str, rows: Sequence[int], tensor: torch.Tensor, ranks: int) -> None:
    if len(rows) != ranks or min(rows) < 0 or sum(rows) != tensor.shape[0]:
        raise DCompileError(f"{word} splits {list(rows)} of a tensor of {tensor.shape[0]} rows over {ranks} ranks")


LAUNCHES: dict[str, Callable[[Launched, Tensors, Tensors, Request], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
}
"""``launch(launched, sources, results, request)`` by ``collectives.nodes.Kind`` value; tensors of one dtype."""


def _gather_single(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """``all_gather_single`` where PyTorch has it (2.13 on), else under its former name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, source, group=group, async_op=True)


def _scatter_single(
    output: torch.Tensor, source: torch.Tensor, op: Any, group: dist.ProcessGroup
) -> tuple[Any, torch.Tensor | None]:
    """A reduce-scatter; where the backend has none, an all-reduce of a copy whose own share is cut out at the wait."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    try:
        return scatter(output, source, op=op, group=group, async_op=True), None
    except RuntimeError as error:  # raised before anything is sent, on every rank alike
        if "support" not in str(error):
            raise
    summed = source.clone()
    return dist.all_reduce(summed, op=op, group=group, async_op=True), summed
