"""Short inner ranges without a loop: every inner position is written out, and reductions are left folds of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as positions

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.combine import bound_to, first_best, rule
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Let
from dcompile.ir.nodes import Reduction
from dcompile.ir.ops import ARG_REDUCTIONS
from dcompile.ir.types import Size
from dcompile.schedule.loops import Domain

UNROLL = 8
"""Inner ranges shorter than this are written out: a loop over fewer elements does not fill one vector, while lanes
along the outer positions always do."""

MAX_UNROLLED_OPS = 256
"""Scalar operations of a body written out; beyond it registers spill and compile time grows faster than linearly."""

MAX_UNROLLED_FLOPS = 8
"""Most arithmetic of one value at one inner position. GCC 12 gives up the lanes of a loop that calls several
transcendental functions: softmax over 4 of 500,000 rows took 27 ms written out, 6 ms as loops."""

Values = dict[str, tuple[ex.Expr, ...]]
"""What stands for each value of the group: one local, or one for every inner position."""


def unrollable(domain: Domain, bodies: list[ex.Expr]) -> bool:
    """Whether a group over ``domain`` is written out: short static inner range, more than one output, small bodies."""
    if not domain.inner or not all(isinstance(n, int) for n in domain.inner) or all(n == 1 for n in domain.outer):
        return False
    count = 1
    for size in domain.inner:
        count *= int(size)
    ops = sum(isinstance(part, ex.Op | ex.Masked) for body in bodies for part in ex.walk(body))
    light = all(ex.flops(body) <= MAX_UNROLLED_FLOPS for body in bodies)
    return light and 0 < count < UNROLL and (ops + 1) * count <= MAX_UNROLLED_OPS


def inner_positions(inner: tuple[Size, ...]) -> Iterator[dict[sympy.Symbol, sympy.Expr]]:
    """The inner variables' values at every inner position, row-major."""
    for place in positions(*(range(int(size)) for size in inner)):
        yield {symbol(f"r{n}"): sympy.Integer(at) for n, at in enumerate(place)}


def at_position(root: ex.Expr, place: dict[sympy.Symbol, sympy.Expr], at: int, values: Values) -> ex.Expr:
    """``root`` at one inner position, values of the group read from locals."""

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if not isinstance(node, ex.Load) or node.buffer not in values:
            return None
        found = values[node.buffer]
        return found[at] if len(found) > 1 else found[0]

    return ex.transform(ex.substitute(root, place), leaf)


def left_fold(node: Reduction, entering: list[tuple[ex.Expr, ...]], name: str) -> tuple[list[Let], tuple[ex.Expr, ...]]:
    """The reduction of what enters at each position, in order: lets, and the results.

    Args:
        entering: one tuple a position, one expression an operand of the kind.
        name: prefix of the locals that hold partial results.
    """
    if node.kind in ARG_REDUCTIONS:
        return _first_best(node, entering, name)
    if node.kind == "welford":
        return _moments([values[0] for values in entering], name)
    combine = rule(node.kind, node.expr.dtype)
    lets: list[Let] = []
    done = entering[0]
    for step, values in enumerate(entering[1:], 1):
        merged = bound_to(combine, done, values)
        done = tuple(_named(lets, f"{name}_{k}_{step}", e) for k, e in enumerate(merged))
    return lets, done


def _named(lets: list[Let], name: str, value: ex.Expr) -> ex.Expr:
    lets.append(Let(name, value))
    return ex.local(name, value.dtype)


def _first_best(
    node: Reduction, entering: list[tuple[ex.Expr, ...]], name: str
) -> tuple[list[Let], tuple[ex.Expr, ...]]:
    lets: list[Let] = []
    best, place = entering[0][0], ex.index(0)
    for step, (value,) in enumerate(entering[1:], 1):
        better = _named(lets, f"{name}_better_{step}", first_best(best, value, node.kind == "argmax"))
        best = _named(lets, f"{name}_best_{step}", ex.op("where", better, value, best))
        place = _named(lets, f"{name}_place_{step}", ex.op("where", better, ex.index(step), place))
    return lets, (place,)


def _moments(values: list[ex.Expr], name: str) -> tuple[list[Let], tuple[ex.Expr, ...]]:
    """Mean and squared distances in two passes over registers."""
    lets: list[Let] = []
    dtype = values[0].dtype
    count = ex.const(len(values), dtype)
    total = values[0]
    for step, value in enumerate(values[1:], 1):
        total = _named(lets, f"{name}_sum_{step}", ex.op("add", total, value))
    mean = _named(lets, f"{name}_mean", ex.op("div", total, count))
    squares: ex.Expr = ex.const(0, dtype)
    for step, value in enumerate(values):
        apart = _named(lets, f"{name}_apart_{step}", ex.op("sub", value, mean))
        squares = _named(lets, f"{name}_squares_{step}", ex.op("add", squares, ex.op("mul", apart, apart)))
    return lets, (mean, squares, count)
