"""The finished program: an ordered graph of kernels, library calls and collectives with a place for every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from dcompile.ir.graph import Graph
from dcompile.ir.types import Size


class Home(Enum):
    """Who owns a storage."""

    INPUT = "input"
    """The caller: a graph input. Never reused or freed."""
    ARENA = "arena"
    """The executable: a byte range of one block per device that lives as long as one call."""
    SHARED = "shared"
    """As ARENA, but of memory that every rank of a group has mapped: at the same place on each of them."""
    FRESH = "fresh"
    """Allocated by the program when first needed: graph outputs, and everything whose size is symbolic."""
    LIBRARY = "library"
    """Allocated by the library call that returns it."""


@dataclass(frozen=True)
class Storage:
    """Memory that one or more values live in.

    Attributes:
        name: the name of the first value in it.
        nbytes: bytes it spans.
        arena_offset: first byte in the arena, a multiple of ``ALIGNMENT``; None unless home is ARENA or SHARED.
        group: label of the group that maps it; "" unless home is SHARED.
        donor: the input whose memory it takes if nobody outside the program holds that any more; only if it is FRESH.
    """

    name: str
    home: Home
    nbytes: Size
    device: str
    arena_offset: int | None = None
    group: str = ""
    donor: str | None = None

    @property
    def arena(self) -> str:
        """The block it is a part of, if it is part of one: a device type, or ``"shared_"`` and the label of a group."""
        return f"shared_{self.group}" if self.home is Home.SHARED else self.device


PARTS = (Home.ARENA, Home.SHARED)
"""Homes of storages that are parts of a block."""

ALIGNMENT = 64
"""Bytes: a cache line, and the width of the widest vector register."""


@dataclass(frozen=True)
class Slot:
    """Where a value lives: ``offset`` bytes into ``storage``, with the value's own shape and strides."""

    storage: str
    offset: Size = 0


@dataclass(frozen=True)
class Verdict:
    """A decision and its reason, for people: what was considered, what was decided, why."""

    stage: str
    subject: str
    decision: str
    reason: str


@dataclass(frozen=True)
class Interval:
    """Predicted run of one step on one lane, in microseconds from the start of the program."""

    position: int
    lane: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Exposure:
    """Time the program waits for one collective with nothing else to do.

    Attributes:
        pending: name of the collective.
        exposed_us: predicted time the compute lane stands still for it.
        total_us: predicted time from launch to completion.
        reason: why no more of it is hidden.
    """

    pending: str
    exposed_us: float
    total_us: float
    reason: str


@dataclass(frozen=True)
class Prediction:
    """The schedule as the cost model sees it, in microseconds.

    Attributes:
        makespan_us: end of the last step.
        program_order_us: the same for the order before scheduling; never less than ``makespan_us``.
        lower_bound_us: no order can be faster than this under the same costs.
    """

    makespan_us: float
    program_order_us: float
    lower_bound_us: float
    intervals: tuple[Interval, ...] = ()
    exposures: tuple[Exposure, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What code generation prints.

    Attributes:
        graph: nodes in execution order: Kernel, Extern, View, Pack, Start, Wait and nothing else.
        slots: place of every tensor value.
        storages: every storage, by name.
        frees: for each position the storages whose last use it is (FRESH and LIBRARY ones; arena bytes are not freed).
        arena_bytes: size of each arena, by ``Storage.arena``.
        peak_bytes: most bytes in use at once, inputs not counted, at the size hints.
        prediction: the schedule's times.
        verdicts: all decisions, in the order they were taken.
    """

    graph: Graph
    slots: Mapping[str, Slot]
    storages: Mapping[str, Storage]
    frees: Mapping[int, tuple[str, ...]]
    arena_bytes: Mapping[str, int]
    peak_bytes: int
    prediction: Prediction | None = None
    verdicts: tuple[Verdict, ...] = field(default=(), compare=False)
