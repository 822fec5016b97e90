"""Gradients of linear interpolation: every input position gathers from the outputs it took part in.

Along a dimension an output ``o`` lies at ``s(o)`` between the input positions, clamped to them, and input ``i`` enters
it with the weight ``max(0, 1 - |s(o) - i|)``. The outputs with a weight above zero are neighbours, so that a position's
gradient is a sum over a short window and nothing is added atomically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy

from dcompile.ir.expr import Expr, const, index, load, masked, op, to
from dcompile.ir.index import FloorDiv
from dcompile.ir.types import DType, Size, Value
from dcompile.lower.builder import ZERO, Lowering, loop_index, reduce_axes
from dcompile.lower.scatter import conjunction
from dcompile.lower.table import NoRule, rule

LARGEST_DENOMINATOR = 1024
"""Of the ratio by which windows move: larger ones would make addresses long and windows no tighter."""


@dataclass(frozen=True)
class Stretch:
    """One dimension of ``size`` positions interpolated to ``count``.

    Attributes:
        step, shift: output ``o`` lies at ``o * step + shift``, clamped to [0, size - 1].
    """

    size: int
    count: int
    step: float
    shift: float

    @classmethod
    def of(cls, size: int, count: int, align_corners: bool, scale: float | None) -> Stretch:
        """As eager PyTorch places outputs: corner on corner, or the middles of cells of ``1 / scale``."""
        if align_corners:
            return cls(size, count, (size - 1) / (count - 1) if count > 1 else 0.0, 0.0)
        step = 1.0 / scale if scale is not None and scale > 0 else size / count
        return cls(size, count, step, 0.5 * step - 0.5)

    @property
    def ratio(self) -> Fraction:
        """About how many outputs windows move on for each input position."""
        if self.step <= 0:
            return Fraction(0)
        return Fraction(1 / self.step).limit_denominator(LARGEST_DENOMINATOR)

    def base(self, i: sympy.Expr) -> sympy.Expr:
        """Where the window of input ``i`` is, but for a constant."""
        return FloorDiv(sympy.expand(i * self.ratio.numerator), sympy.Integer(self.ratio.denominator))

    def window(self) -> tuple[int, int]:
        """First output of a window less ``base``, and the length that all windows fit in."""
        away, ratio = [], self.ratio
        for output in range(self.count):
            at = min(max(output * self.step + self.shift, 0), self.size - 1)
            for near in (math.floor(at), math.ceil(at)):  # what float32 rounds past a position weighs next to nothing
                away.append(output - near * ratio.numerator // ratio.denominator)
        return min(away), max(away) - min(away) + 1

    def weight(self, o: sympy.Expr, i: sympy.Expr, dtype: DType) -> Expr:
        """With what weight input ``i`` enters output ``o``, in ``dtype``."""
        zero, one = const(0, dtype), const(1, dtype)
        at = op("add", op("mul", to(index(o), dtype), const(self.step, dtype)), const(self.shift, dtype))
        at = op("minimum", op("maximum", at, zero), const(self.size - 1, dtype))
        return op("maximum", op("sub", one, op("abs", op("sub", at, to(index(i), dtype)))), zero)


def _stretches(shape: tuple[Size, ...], grad: Value, align_corners: bool, scales: tuple[Any, ...]) -> list[Stretch]:
    """
    Raises:
        NoRule: symbolic sizes, whose windows are unknown, or none.
    """
    sizes, counts = shape[2:], grad.shape[2:]
    if not all(isinstance(n, int) and n > 0 for n in (*sizes, *counts)):
        raise NoRule
    given = (*scales, *[None] * (len(sizes) - len(scales)))
    if not all(scale is None or isinstance(scale, int | float) for scale in given):
        raise NoRule
    return [Stretch.of(int(n), int(m), align_corners, s) for n, m, s in zip(sizes, counts, given, strict=True)]


@rule("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_trilinear3d_backward")
def linear_backward(
    b: Lowering, grad: Value, output_size: Any, input_size: Any, align_corners: bool, *scales: Any
) -> Value:
    out, dtype = b.out, b.out.dtype.compute
    stretches = _stretches(out.shape, grad, align_corners, scales)
    here = loop_index(out.shape)
    lead, at = here[:2], here[2:]
    windows = [stretch.window() for stretch in stretches]
    axes = reduce_axes([length for _, length in windows])
    where, conditions = [], []
    weight: Expr = const(1, dtype)
    for stretch, i, (first, length), (step, _) in zip(stretches, at, windows, axes, strict=True):
        o = sympy.expand(stretch.base(i) + first + (ZERO if length == 1 else step))
        where.append(o)
        conditions += [op("ge", index(o), const(0, DType.I64)), op("lt", index(o), index(stretch.count))]
        weight = op("mul", weight, stretch.weight(o, i, dtype))
    share = op("mul", to(load(grad.name, (*lead, *where), grad.dtype), dtype), weight)
    return b.reduction(out, "sum", axes, masked(conjunction(conditions), share, const(0, dtype)))
