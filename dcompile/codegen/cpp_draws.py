"""Uniform numbers of a simd loop, drawn for a stretch of it at once.

A call of the generator gives four words and fills vector lanes with 32-bit numbers only, which a loop over floats,
addresses and bytes does not: drawing element after element took 8 ns each, a stretch at once 0.7 ns (one Zen 3 core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sympy

from dcompile.codegen.cpp_loops import at_least_one, for_text
from dcompile.codegen.cpp_scope import Emitter
from dcompile.ir import expr as ex
from dcompile.ir.nodes import Axis

STRETCH = 1024
"""Most numbers drawn at once: 4 KiB, so that those of several masks stay in the first-level cache."""

MAX_DRAWS = 8
"""Most streams drawn ahead in one loop: 32 KiB, the size of that cache."""


@dataclass(frozen=True)
class Drawn:
    """One stream of a loop: the op, and the C++ array of its words."""

    op: ex.Op
    words: str


def draws_along(out: Emitter, roots: Iterable[ex.Expr], var: sympy.Symbol) -> list[ex.Op]:
    """The uniform numbers in ``roots`` whose offset grows by one with ``var`` and whose seed is known outside."""
    parts = dict.fromkeys(part for root in roots for part in ex.walk(root))
    return [part for part in parts if isinstance(part, ex.Op) and part.name == "rand" and _advances(out, part, var)][
        :MAX_DRAWS
    ]


def _advances(out: Emitter, op: ex.Op, var: sympy.Symbol) -> bool:
    seed, offset = op.args
    if not isinstance(offset, ex.Index) or offset.bind or sympy.diff(offset.expr, var) != 1:
        return False
    facts = out.facts(seed)
    return not facts.own and var not in facts.symbols and all(name in out.locals for name in facts.locals)


def drawn_loop(
    out: Emitter,
    axis: Axis,
    found: list[ex.Op],
    begin: str,
    end: str,
    loop: Callable[[str, str, list[Drawn]], None],
) -> None:
    """``loop(begin, end, drawn)`` over ``axis``, in stretches unless it is short, after the words it takes."""
    var, extent = axis
    whole = begin == "0" and isinstance(extent, int) and extent <= STRETCH
    if whole:
        _draw(out, var, found, "0", end, str(extent), loop)
        return
    start = out.fresh("k")
    with out.scope(certain=at_least_one(extent) and begin == "0") as inner:
        out.line(f"const int64_t {start}_end = dc::min_index({start} + {STRETCH}, {end});")
        _draw(out, var, found, start, f"{start}_end", str(STRETCH), loop)
    out.block(for_text(start, begin, end).replace(f"{start}++", f"{start} += {STRETCH}"), inner)


def _draw(
    out: Emitter,
    var: sympy.Symbol,
    found: list[ex.Op],
    begin: str,
    end: str,
    room: str,
    loop: Callable[[str, str, list[Drawn]], None],
) -> None:
    drawn: list[Drawn] = []
    before = out.symbols.get(var)
    for op in found:
        words = out.fresh("w")
        seed = out.value(op.args[0])
        out.bind_symbol(var, begin)
        offset = op.args[1]
        assert isinstance(offset, ex.Index)
        first = out.index(offset.expr)
        del out.symbols[var]
        out.line(f"alignas(64) uint32_t {words}[{room}];")
        out.line(f"dc::draw({seed}, {first}, {end} - {begin}, {words});")
        drawn.append(Drawn(op, words))
    if before is not None:
        out.symbols[var] = before
    loop(begin, end, drawn)


def take(out: Emitter, drawn: Iterable[Drawn], text: str, begin: str) -> None:
    """Inside the loop, whose variable is ``text``: every op's number, by which the body finds it."""
    for one in drawn:
        name = out.fresh("t")
        out.line(f"const float {name} = dc::uniform({one.words}[{text} - {begin}]);")
        out.scopes[-1].names[one.op] = name
