"""Collectives as graph nodes. ``Start`` launches and gives a ``Pending``; only ``Wait`` turns a Pending into tensors.

Grammar, beside that of ``ir.nodes``::

    node = pending = start kind[.reduction] (sources) @group [in place] [root n]
           [splits [size, ...] -> [size, ...]] [via lowering]
         | value... = wait pending

From the start to its wait nobody writes, frees or reuses the sources, and nobody touches the results. In place the
results are the sources' own storage, so nobody touches them at all. Every Start has exactly one Wait in the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from dcompile.collectives.group import Group
from dcompile.ir.nodes import Node
from dcompile.ir.types import Def, Size, Value


class Kind(Enum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST = "broadcast"
    ALL_TO_ALL = "all_to_all"


class Via(Enum):
    """Who moves the bytes of a collective. All give the same numbers."""

    LIBRARY = "library"
    """The process group's backend."""
    FEW_CTAS = "few_ctas"
    """NCCL on few multiprocessors: slower alone, but it leaves the others to compute."""
    PEERS = "peers"
    """Copy engines, straight into the memory of the other ranks: results lie in symmetric memory. Multiprocessors stay
    free for compute."""


MOVES = frozenset({Kind.ALL_GATHER, Kind.ALL_TO_ALL})
"""Kinds that copy without arithmetic, which copy engines can do."""

REDUCTIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
"""Reductions of ALL_REDUCE and REDUCE_SCATTER, named as ``torch.distributed.ReduceOp`` names them, in lower case."""


@dataclass(frozen=True)
class Pending(Def):
    """A collective in flight.

    Attributes:
        results: the tensors its Wait will define, by the names it will define them under. Their storage is in use
            from the Start on.
        in_place: result ``n`` is the storage of source ``n``.
    """

    results: tuple[Value, ...]
    in_place: bool


@dataclass(frozen=True, kw_only=True)
class Start(Node):
    """Launch of a collective over one or more sources (several: coalesced, one launch).

    Attributes:
        reduction: one of ``REDUCTIONS`` for reducing kinds, else None.
        root: sending rank within the group for BROADCAST, else None.
        in_splits, out_splits: for ALL_TO_ALL with unequal shares, rows of the source that go to each rank and rows of
            the result that come from each; both empty where all shares are equal. They may differ from rank to rank.
        via: its lowering.
    """

    pending: Pending
    kind: Kind
    group: Group
    sources: tuple[str, ...]
    reduction: str | None = None
    root: int | None = None
    in_splits: tuple[Size, ...] = ()
    out_splits: tuple[Size, ...] = ()
    via: Via = Via.LIBRARY

    @property
    def defs(self) -> tuple[Def, ...]:
        return (self.pending,)

    @property
    def extra_sizes(self) -> tuple[Size, ...]:
        return (*self.in_splits, *self.out_splits)

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.sources))

    @property
    def mutates(self) -> tuple[str, ...]:
        return self.operands if self.pending.in_place else ()

    @property
    def has_effect(self) -> bool:
        return True

    def rename(self, names: dict[str, str]) -> Start:
        return replace(self, sources=tuple(names.get(s, s) for s in self.sources))


@dataclass(frozen=True, kw_only=True)
class Wait(Node):
    """End of a collective: its results may be read from here on, its sources written or freed."""

    outs: tuple[Value, ...]
    pending: str

    @property
    def defs(self) -> tuple[Value, ...]:
        return self.outs

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.pending,)

    @property
    def has_effect(self) -> bool:
        return True

    def rename(self, names: dict[str, str]) -> Wait:
        return replace(self, pending=names.get(self.pending, self.pending))
