"""A communicator that punishes every touch of a buffer in flight.

From launch to wait, tensors a program must not read are full of NaN (integers: a byte pattern), and what it must not
write is compared with a copy at the wait. Inputs of out-of-place collectives are read at the wait, as late as a real
backend may. So a program that reads, writes, frees or reuses a buffer in flight fails or computes wrong numbers.

One process plays all ranks: programs of several ranks run in threads and meet at their waits. ``World(1, ranks=n)``
runs one program and pretends that ``n`` ranks hold the same data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dcompile.runtime.comm import Handle

T = TypeVar("T")
PATTERN = 0xA5
"""Byte of poisoned integer buffers: no plausible value in any width."""

MEETING_DEADLINE_S = 30.0


class Touched(AssertionError):
    """The program wrote to a buffer in flight."""


def poison(tensor: Tensor) -> None:
    """Make every element of ``tensor`` unusable."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        tensor.copy_(
            torch.full((tensor.numel() * tensor.dtype.itemsize,), PATTERN, dtype=torch.uint8)
            .view(tensor.dtype)
            .view(tensor.shape)
        )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


class Flight(Handle):
    """A collective in flight and what its buffers must look like at the wait."""

    __slots__ = (
        "in_place",
        "kind",
        "number",
        "reduction",
        "results",
        "root",
        "snapshots",
        "sources",
        "splits",
        "truth",
    )

    def __init__(self, name: str, group: str, number: int) -> None:
        super().__init__(name, group)
        self.number = number
        self.works = [self]


class World:
    """All ranks.

    Args:
        programs: how many programs take part, one rank each.
        ranks: size of every group; more than ``programs`` only if there is one program, whose data all ranks then have.
        groups: ranks of each group label; a label that is not named is the whole world.
    """

    def __init__(
        self, programs: int = 1, ranks: int | None = None, groups: Mapping[str, Sequence[Sequence[int]]] | None = None
    ) -> None:
        self.programs, self.ranks = programs, ranks or programs
        self.groups = groups or {}
        self.meetings: dict[tuple[Any, ...], dict[int, tuple[Tensor, ...]]] = {}
        self.arrived = threading.Condition()

    def comm(self, rank: int = 0) -> AdversaryComm:
        return AdversaryComm(self, rank)

    def members(self, label: str, rank: int) -> tuple[int, ...]:
        """The ranks of the group ``label`` that ``rank`` belongs to."""
        for group in self.groups.get(label, ()):
            if rank in group:
                return tuple(group)
        return tuple(range(self.ranks))

    def meet(self, flight: Flight, rank: int, sources: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Sources of all members, once every one has come to the same wait."""
        members = self.members(flight.group, rank)
        if self.programs == 1:
            return [sources] * len(members)
        key = (flight.group, members, flight.number)
        with self.arrived:
            self.meetings.setdefault(key, {})[rank] = sources
            self.arrived.notify_all()
            there = self.arrived.wait_for(lambda: len(self.meetings[key]) == len(members), MEETING_DEADLINE_S)
            assert there, f"rank {rank} waits alone for {flight.name}: {sorted(self.meetings[key])} of {members} came"
            return [self.meetings[key][member] for member in members]

    def run(self, bodies: Sequence[Callable[[], T]]) -> list[T]:
        """Run one function a rank at the same time; their results, or the first error."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def main(rank: int) -> None:
            try:
                results[rank] = bodies[rank]()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * MEETING_DEADLINE_S)
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(len(bodies))]


class AdversaryComm:
    """``dcompile.runtime.comm.Communicator`` of one rank of a ``World``.

    Attributes:
        launched, waited: names in order, for tests of schedules.
        most_in_flight: collectives in flight at once.
    """

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.launched: list[str] = []
        self.waited: list[str] = []
        self.flying: list[Flight] = []
        self.most_in_flight = 0
        self._numbers: dict[str, int] = {}

    def start(
        self,
        kind: str,
        sources: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        group: str,
        reduction: str | None,
        root: int | None,
        in_place: bool,
        name: str,
        splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> Flight:
        number = self._numbers[group] = self._numbers.get(group, 0) + 1
        flight = Flight(name, group, number)
        flight.kind, flight.reduction, flight.root, flight.in_place = kind, reduction, root, in_place
        flight.splits = splits
        flight.sources, flight.results = sources, results
        flight.truth = tuple(source.clone() for source in sources)
        for result in results:
            poison(result)
        watched = results if in_place else (*sources, *results)
        flight.snapshots = tuple((tensor, tensor.clone()) for tensor in watched)
        self.flying.append(flight)
        self.most_in_flight = max(self.most_in_flight, len(self.flying))
        self.launched.append(name)
        return flight

    def wait(self, handle: Handle) -> None:
        assert isinstance(handle, Flight)
        assert handle in self.flying, f"{handle.name} is waited for twice"
        for tensor, snapshot in handle.snapshots:
            if not same_bytes(tensor, snapshot):
                raise Touched(f"{handle.name}: a buffer of shape {list(tensor.shape)} was written while in flight")
        mine = handle.truth if handle.in_place else tuple(source.clone() for source in handle.sources)
        if handle.splits is not None:
            mine = tuple(torch.split(mine[0], list(handle.splits[0])))
        everyone = self.world.meet(handle, self.rank, mine)
        position = self.world.members(handle.group, self.rank).index(self.rank)
        if handle.splits is not None:
            handle.results[0].copy_(torch.cat([shares[position] for shares in everyone]))
        for n, result in enumerate(handle.results if handle.splits is None else ()):
            values = [sources[n] for sources in everyone]
            result.copy_(collective(handle.kind, values, position, handle.reduction, handle.root).view(result.shape))
        self.flying.remove(handle)
        self.waited.append(handle.name)
        handle.done()

    def drain(self, handles: Iterable[Handle | None], patient: bool = True) -> bool:
        for handle in handles:
            if isinstance(handle, Flight) and handle in self.flying:
                self.wait(handle)
        return True


def collective(kind: str, values: list[Tensor], position: int, reduction: str | None, root: int | None) -> Tensor:
    """The result on the rank at ``position`` of a group whose ranks contribute ``values``."""
    if kind == "broadcast":
        assert root is not None
        return values[root]
    if kind == "all_gather":
        return torch.cat([torch.atleast_1d(value) for value in values])
    if kind == "all_to_all":
        return torch.cat([value.chunk(len(values))[position] for value in values])
    whole = reduce_all(values, reduction or "")
    return whole.chunk(len(values))[position] if kind == "reduce_scatter" else whole


def reduce_all(values: list[Tensor], reduction: str) -> Tensor:
    """Elementwise ``reduction`` in rank order."""
    step: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sum": torch.add,
        "avg": torch.add,
        "product": torch.mul,
        "min": torch.minimum,
        "max": torch.maximum,
        "band": torch.bitwise_and,
        "bor": torch.bitwise_or,
        "bxor": torch.bitwise_xor,
    }
    total = values[0].clone()
    for value in values[1:]:
        total = step[reduction](total, value)
    return total / len(values) if reduction == "avg" else total
