"""Mean and variance in one read: accumulators with three results.

A block of elements is summed as distances from a shift that is close to their mean (the running mean, or the mean of a
few of its elements), and so are the squares of these distances; both sums run in vector lanes. The block's own mean and
M2 follow from them and enter the double-precision total by the pairwise formula. Where the shift turns out to lie far
from the block's mean, so that the subtraction would cancel, the block, which is in cache, is read once more with its
now known mean as the shift (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", Am. Stat. 37, 1983:
shifted data and pairwise combination). Side by side in lanes every lane has its own shift and sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.codegen.cpp_fold import Folding, Variable
from dcompile.codegen.cpp_types import literal
from dcompile.ir.kernel import Accumulator

SAMPLES = 3
"""Elements of a block, evenly spaced, whose mean is the first shift."""

CANCELLATION = 8
"""A block is summed again if its M2 is less than this part of its squared distances from the shift, which would lose
three bits. The mean of ``SAMPLES`` normal elements is that far away less than once in 100,000 blocks."""

_TOTALS = (Variable("_mean", "double", "0.0", None), Variable("_m2", "double", "0.0", None))
_WEIGHT = Variable("_n", "double", "0.0", None)


class ShiftedMoments(Folding):
    """``welford``; always runs in blocks.

    Args:
        several: there may be more than one block, or none.
    """

    def __init__(self, acc: Accumulator, name: str, several: bool) -> None:
        super().__init__(acc, name, blocked=False)
        self.blocked = True
        self.several = several

    @property
    def variables(self) -> tuple[Variable, ...]:
        return (*_TOTALS, _WEIGHT)

    @property
    def inner(self) -> tuple[Variable, ...]:
        zero = literal(0, self.dtype)
        return Variable("_s1", self.type, zero, "+"), Variable("_s2", self.type, zero, "+")

    @property
    def shift(self) -> str:
        """The variable that distances are taken from."""
        return f"{self.name}_shift"

    def update(self, values: Sequence[str], position: str, at: str = "") -> list[str]:
        apart = f"{self.name}_d"
        return [
            f"const {self.type} {apart} = {values[0]} - {self.shift}{at};",
            f"{self.name}_s1{at} += {apart};",
            f"{self.name}_s2{at} += {apart} * {apart};",
        ]

    def sample(self, value: str, at: str = "") -> str:
        """The statement that takes one of the sampled elements into the shift."""
        return f"{self.shift}{at} += {value} * {literal(1 / SAMPLES, self.dtype)};"

    def finite(self, at: str = "") -> str:
        """The statement that gives up a shift that is not finite."""
        return f"{self.shift}{at} = __builtin_isfinite({self.shift}{at}) ? {self.shift}{at} : {literal(0, self.dtype)};"

    def cancels(self, count: str, at: str = "") -> str:
        """The condition under which the block of ``count`` elements must be summed again."""
        left = f"(double){self.name}_s2{at} * (double)({count}) * {1 - 1 / CANCELLATION!r}"
        return f"{left} < (double){self.name}_s1{at} * (double){self.name}_s1{at}"

    def again(self, count: str, at: str = "") -> list[str]:
        """Statements between the first and the second time."""
        return [
            f"{self.shift}{at} += {self.name}_s1{at} / ({self.type})({count});",
            *(f"{self.name}{v.suffix}{at} = {v.start};" for v in self.inner),
        ]

    def close_counted(self, count: str, at: str = "") -> list[str]:
        """Statements that add the finished block of ``count`` elements to the total."""
        name = self.name
        own = f"{name}_mean{at}, {name}_m2{at}, {name}_n{at}"
        function = "add_moments" if self.several else "only_moments"
        return [f"dc::{function}({own}, {self.shift}{at}, {name}_s1{at}, {name}_s2{at}, (double)({count}));"]

    def merge(self, part: str, at: str) -> list[str]:
        return [_merged(self.name, "", tuple(f"{part}{v.suffix}{at}" for v in self.variables))]

    def results(self, at: str = "") -> tuple[str, ...]:
        return tuple(f"({self.type}){self.name}{v.suffix}{at}" for v in self.variables)


class MergedMoments(Folding):
    """``welford_merge``: triples enter one by one, in double precision."""

    def __init__(self, acc: Accumulator, name: str) -> None:
        super().__init__(acc, name, blocked=False)

    @property
    def inner(self) -> tuple[Variable, ...]:
        return (*_TOTALS, _WEIGHT)

    def update(self, values: Sequence[str], position: str, at: str = "") -> list[str]:
        return [_merged(self.name, at, tuple(values))]

    def merge(self, part: str, at: str) -> list[str]:
        return [_merged(self.name, "", tuple(f"{part}{v.suffix}{at}" for v in self.variables))]

    def results(self, at: str = "") -> tuple[str, ...]:
        return tuple(f"({self.type}){self.name}{v.suffix}{at}" for v in self.variables)


def folding(acc: Accumulator, name: str, blocked: bool) -> Folding:
    """The accumulator ``name``; ``blocked``: a sum of several blocks."""
    if acc.kind == "welford":
        return ShiftedMoments(acc, name, several=blocked)
    return MergedMoments(acc, name) if acc.kind == "welford_merge" else Folding(acc, name, blocked)


def _merged(name: str, at: str, part: tuple[str, ...]) -> str:
    own = (f"{name}{v.suffix}{at}" for v in (*_TOTALS, _WEIGHT))
    return f"dc::merge_moments({', '.join((*own, *part))});"
