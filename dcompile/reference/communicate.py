"""Collectives over the tensors of all members at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dcompile.collectives.nodes import Kind, Start
from dcompile.errors import CompilerBug, Divergence


@dataclass(frozen=True)
class Argument:
    """One rank's arrival at a collective with copies of its sources, each contiguous."""

    rank: int
    start: Start
    sources: list[Tensor]
    splits: tuple[list[int], list[int]] | None = None
    """Rows to and from each rank, where they are not equal."""


_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def exchange(members: list[Argument]) -> list[list[Tensor]]:
    """The results of a collective, for each member in order, one tensor a source.

    Reductions go in rank order, in the sources' dtype; an average of integers rounds to zero.

    Raises:
        Divergence: the members launch different collectives, or sources of different shapes or dtypes.
    """
    _agree(members)
    if members[0].splits is not None:
        return _shares(members)
    results: list[list[Tensor]] = [[] for _ in members]
    for sources in zip(*(member.sources for member in members), strict=True):
        for result, tensor in zip(results, _one(members[0].start, list(sources)), strict=True):
            result.append(tensor)
    return results


def _agree(members: list[Argument]) -> None:
    def form(member: Argument) -> tuple[object, ...]:
        start = member.start
        rows = 0 if member.splits is None else 1  # how many rows there are may differ from rank to rank
        sources = tuple((s.dtype, tuple(s.shape)[rows:]) for s in member.sources)
        return (start.kind.value, start.reduction, start.root, start.pending.in_place, sources, rows)

    for member in members:
        if member.start.group.size != len(members):
            raise Divergence(
                f"rank {member.rank}: {member.start.pending.name} is over a group of {member.start.group.size}, "
                f"but {member.start.group.label} has {len(members)} members"
            )
        if form(member) != form(members[0]):
            raise Divergence(
                f"rank {members[0].rank} launches {members[0].start.pending.name} as {form(members[0])}, "
                f"rank {member.rank} launches {member.start.pending.name} as {form(member)}"
            )


def _shares(members: list[Argument]) -> list[list[Tensor]]:
    """All-to-all in unequal shares."""
    parts, results = [], []
    for member in members:
        sent, _ = _splits(member)
        if sum(sent) != member.sources[0].shape[0] or len(sent) != len(members) or min(sent) < 0:
            raise CompilerBug(f"{member.start.pending.name} splits {tuple(member.sources[0].shape)} into {sent}")
        parts.append(torch.split(member.sources[0], sent))
    for rank, member in enumerate(members):
        got = [len(part[rank]) for part in parts]
        if got != _splits(member)[1]:
            raise Divergence(f"rank {member.rank} expects {_splits(member)[1]} rows, the others send {got}")
        results.append([torch.cat([part[rank] for part in parts])])
    return results


def _splits(member: Argument) -> tuple[list[int], list[int]]:
    if member.splits is None:
        raise CompilerBug(f"{member.start.pending.name} has no splits")
    return member.splits


def _one(start: Start, sources: list[Tensor]) -> list[Tensor]:
    count = len(sources)
    if start.kind is Kind.ALL_REDUCE:
        total = _reduce(start, sources)
        return [total] * count
    if start.kind is Kind.REDUCE_SCATTER:
        return list(_rows(start, _reduce(start, sources), count))
    if start.kind is Kind.ALL_GATHER:
        gathered = torch.cat([s.reshape(1) if s.ndim == 0 else s for s in sources])
        return [gathered] * count
    if start.kind is Kind.BROADCAST:
        if start.root is None or start.root >= count:
            raise CompilerBug(f"{start.pending.name} broadcasts from rank {start.root} of {count}")
        return [sources[start.root]] * count
    if start.kind is Kind.ALL_TO_ALL:
        parts = [_rows(start, s, count) for s in sources]
        return [torch.cat([part[rank] for part in parts]) for rank in range(count)]
    raise CompilerBug(f"{start.kind} is not a collective")


def _rows(start: Start, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise CompilerBug(f"{start.pending.name} divides shape {tuple(tensor.shape)} over {count} ranks")
    return torch.tensor_split(tensor, count)


def _reduce(start: Start, sources: list[Tensor]) -> Tensor:
    if start.reduction not in _COMBINE:
        raise CompilerBug(f"{start.pending.name} reduces by {start.reduction}")
    total = reduce(_COMBINE[start.reduction], sources).clone()
    if start.reduction == "avg":
        exact = total.dtype.is_floating_point or total.dtype.is_complex
        total = total / len(sources) if exact else torch.div(total, len(sources), rounding_mode="trunc")
    return total
