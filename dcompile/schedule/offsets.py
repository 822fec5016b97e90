"""Offset allocation: byte ranges of one block for buffers whose lifetimes are known beforehand.

Two buffers may share bytes when their lifetimes do not meet. Finding the smallest block is NP-hard (dynamic storage
allocation); the heuristics here are the greedy ones of Pisarchyk and Lee, "Efficient Memory Management for Deep Neural
Net Inference" (2020): take the buffers in a fixed order and put each one into a gap between those buffers, already
placed, that live at the same time. Three orders with three choices of the gap are tried and the smallest
result is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, product

from dcompile.plan import ALIGNMENT

CHUNK = 16
"""Positions per cell of the index that finds the buffers alive at the same time: activations and gradients mostly die
within a few steps, so that a look-up opens one or two cells. 8,500 buffers over 10,500 steps take 0.1 s an attempt."""


@dataclass(frozen=True)
class Request:
    """A buffer that needs ``nbytes`` bytes from position ``first`` to position ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Assignment:
    """Where the buffers lie.

    Attributes:
        offsets: first byte of each buffer by name, a multiple of ``ALIGNMENT``; 0 for empty buffers.
        nbytes: bytes of the block.
        live_bytes: most bytes alive at one position: no assignment can be smaller.
    """

    offsets: dict[str, int]
    nbytes: int
    live_bytes: int


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def max_live_bytes(requests: Sequence[Request]) -> int:
    """Most bytes alive at one position, each buffer rounded up to ``ALIGNMENT``."""
    change: dict[int, int] = {}
    for request in requests:
        change[request.first] = change.get(request.first, 0) + aligned(request.nbytes)
        change[request.last + 1] = change.get(request.last + 1, 0) - aligned(request.nbytes)
    return max(accumulate(change[position] for position in sorted(change)), default=0)


class Fit(Enum):
    """Which of the gaps that are large enough a buffer takes."""

    TIGHTEST = "tightest"
    LOWEST = "lowest"
    ENDS = "both ends"
    """The bottom of the lowest and the top of the highest in turn: best for chains, where neighbours live together."""


_ORDERS: tuple[Callable[[Request], tuple[int, ...]], ...] = (
    lambda r: (-r.nbytes, r.first),
    lambda r: (r.first, -r.nbytes),
    lambda r: (-r.nbytes * (r.last - r.first + 1), r.first),
)
"""By size, by birth, by size times lifetime."""


def assign_offsets(requests: Sequence[Request]) -> Assignment:
    """Place all buffers in one block, deterministically; stops early when the lower bound is reached."""
    live = max_live_bytes(requests)
    empty = {request.name: 0 for request in requests if request.nbytes == 0}
    solid = [request for request in requests if request.nbytes > 0]
    best: dict[str, int] = {}
    total: int | None = None
    for key, fit in product(_ORDERS, Fit):
        offsets, end = _place(sorted(solid, key=key), fit, live)
        if total is None or end < total:
            best, total = offsets, end
        if total == live:
            break
    return Assignment(best | empty, total or 0, live)


def _place(order: Sequence[Request], fit: Fit, limit: int) -> tuple[dict[str, int], int]:
    """Place in the given order, below ``limit`` while that is possible; offsets and the end of the highest buffer."""
    cells: dict[int, list[int]] = {}
    starts: list[int] = []
    ends: list[int] = []
    total = 0
    for number, request in enumerate(order):
        touched = range(request.first // CHUNK, request.last // CHUNK + 1)
        near = {n for cell in touched for n in cells.get(cell, ())}
        taken = sorted(
            (starts[n], ends[n]) for n in near if order[n].first <= request.last and request.first <= order[n].last
        )
        gaps = _gaps(taken, aligned(request.nbytes), limit)
        start = _choose(gaps, aligned(request.nbytes), fit, number)
        starts.append(start)
        ends.append(start + aligned(request.nbytes))
        total = max(total, ends[-1])
        for cell in touched:
            cells.setdefault(cell, []).append(number)
    return {request.name: start for request, start in zip(order, starts, strict=True)}, total


def _gaps(taken: Sequence[tuple[int, int]], nbytes: int, limit: int) -> list[tuple[int, int]]:
    """Begin and end of the gaps that hold ``nbytes`` between ranges sorted by start; the last one ends at ``limit``,
    or holds just ``nbytes`` beyond it."""
    gaps: list[tuple[int, int]] = []
    top = 0
    for start, end in taken:
        if start - top >= nbytes:
            gaps.append((top, start))
        top = max(top, end)
    if limit - top >= nbytes:
        gaps.append((top, limit))
    return gaps or [(top, top + nbytes)]


def _choose(gaps: Sequence[tuple[int, int]], nbytes: int, fit: Fit, number: int) -> int:
    """First byte of the ``number``-th buffer."""
    if fit is Fit.TIGHTEST:
        return min(gaps, key=lambda gap: (gap[1] - gap[0], gap[0]))[0]
    return gaps[-1][1] - nbytes if fit is Fit.ENDS and number % 2 else gaps[0][0]
