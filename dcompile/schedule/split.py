"""Into how many parts a reduction is cut so that it fills a GPU, as pure functions of sizes and of the processor.

A reduction to few values has too few outer positions to occupy every multiprocessor. It is cut into ``split`` parts,
each reduced by programs of its own, and a second small reduction combines them. How many parts: enough programs for the
threads of the whole chip, but not fewer than ``LEAST`` elements a thread, and not more than ``MOST``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Hint(Enum):
    """How a reduction lies in memory, for whoever chooses block sizes.

    ``OUTER_TINY`` is a second stage down columns that is too small for a block of its own.
    """

    INNER = "inner"
    OUTER = "outer"
    OUTER_TINY = "outer tiny"
    DEFAULT = "default"


@dataclass(frozen=True)
class Processor:
    """What the cut depends on.

    Attributes:
        multiprocessors: of the GPU; 0 for a processor without any, on which nothing is cut.
        resident_threads: threads that are resident on one multiprocessor.
    """

    multiprocessors: int
    resident_threads: int = 2048

    @property
    def threads(self) -> int:
        return self.multiprocessors * self.resident_threads


CPU = Processor(0)

ROW_THREADS, ROW_BLOCKS_SHARE = 256, 2
"""Threads that reduce one part along memory, and of how many such blocks a multiprocessor should hold one."""

COLUMN_THREADS, COLUMN_ROWS = 128, 4
"""Columns of one program that reduces across memory, and rows it takes at once."""

LEAST, MOST = 32, 512
"""Elements of one thread: below the least a second kernel costs more than it saves, above the most the chip's memory
system is busy anyway."""

ROUND_ROW, ROUND_COLUMN, ROUND_MOST = 30, 20, 50
"""How far the elements of a thread may move to divide the reduction evenly, which saves the masks."""


def nearest_divisor(n: int, near: int) -> int:
    """The divisor of ``n`` closest to ``near``, the smaller one of two."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return min(sorted({*small, *(n // d for d in small)}), key=lambda d: (abs(d - near), d))


def parts_of_row(reduced: int, outputs: int, processor: Processor) -> int:
    """Parts of each of ``outputs`` reductions over ``reduced`` neighbouring elements; 1 means not cut."""
    if outputs >= 2 * processor.multiprocessors or reduced <= LEAST * ROW_THREADS:
        return 1
    work = reduced * outputs
    if work <= LEAST * processor.threads:
        each = LEAST
    elif work < MOST * processor.threads:
        blocks = _ceil(processor.threads // (ROW_BLOCKS_SHARE * ROW_THREADS), outputs)
        each = _rounded(reduced, _ceil(reduced, ROW_THREADS * blocks), ROUND_ROW)
    else:
        each = _most(reduced)
    return _ceil(reduced, ROW_THREADS * each)


def parts_of_column(reduced: int, outputs: int, processor: Processor) -> int:
    """Parts of ``outputs`` reductions side by side over ``reduced`` rows; 1 means not cut."""
    work = reduced * outputs
    if work < LEAST * processor.threads:
        each = LEAST
    elif work < MOST * processor.threads:
        blocks = _ceil(processor.threads // (2 * COLUMN_THREADS), _ceil(outputs, COLUMN_THREADS))
        each = _rounded(reduced, _ceil(reduced, COLUMN_ROWS * blocks), ROUND_COLUMN)
    else:
        each = _most(reduced)
    return _ceil(reduced, COLUMN_ROWS * each)


def choose_parts(reduced: int, outputs: int, runs: Hint, processor: Processor) -> tuple[Hint, int]:
    """Hint and number of parts of a reduction.

    Args:
        reduced: elements folded into one value.
        outputs: number of values.
        runs: INNER or OUTER, as its operands lie in memory; DEFAULT if nothing is read that says so.
    """
    if processor.multiprocessors == 0:
        return Hint.DEFAULT, 1
    if outputs == 1 and runs is not Hint.DEFAULT:
        return Hint.INNER, parts_of_row(reduced, 1, processor)
    if runs is Hint.DEFAULT or reduced <= LEAST or outputs >= 64 * processor.multiprocessors or outputs == 0:
        return Hint.DEFAULT, 1
    if runs is Hint.INNER:
        return runs, parts_of_row(reduced, outputs, processor)
    return runs, parts_of_column(reduced, outputs, processor)


def second_stage_hint(parts: int, outputs: int, hint: Hint) -> Hint:
    """The hint of the reduction that combines ``parts``."""
    tiny = (parts <= 512 and outputs <= 512) or (parts <= 1024 and outputs <= 256)
    return Hint.OUTER_TINY if hint is Hint.OUTER and tiny else hint


def _rounded(reduced: int, each: int, reach: int) -> int:
    near = nearest_divisor(reduced, each)
    return max(near, LEAST) if abs(near - each) < reach else each


def _most(reduced: int) -> int:
    near = nearest_divisor(reduced, MOST)
    return near if abs(near - MOST) < ROUND_MOST else MOST


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
