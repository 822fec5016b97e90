"""Possible values for sizes that depend on data, for decisions and for the proof of the plan at example sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy

USUAL = 8
"""Tried first: large enough that loops over it are worth something, small enough to fit most bounds."""
MAX_TRIES = 20_000


def choose_hints(shape_env: Any, backed: Mapping[sympy.Symbol, Any]) -> dict[sympy.Basic, int]:
    """A value for every symbol without one, within its range and, if some are found in time, such that everything the
    program asserts of them holds together.

    Args:
        shape_env: the tracer's record of symbols, ranges and assertions still to be made at run time.
        backed: symbols with a value seen while tracing.
    """
    asserted = [item.expr for items in shape_env.deferred_runtime_asserts.values() for item in items]
    known = {s: sympy.Integer(int(v)) for s, v in backed.items() if s.is_integer}
    conditions = [expr.xreplace(known) for expr in asserted]
    unknown = sorted(
        (s for s in shape_env.var_to_range if s not in backed and s.is_integer), key=lambda s: (len(s.name), s.name)
    )
    ranges = {s: _bounds(shape_env.var_to_range[s]) for s in unknown}
    search = _Search(unknown, ranges, conditions)
    return search.run() or {s: _clamped(USUAL, ranges[s]) for s in unknown}


class _Search:
    """Backtracking over a few candidates for each symbol in turn."""

    def __init__(
        self,
        unknown: list[sympy.Symbol],
        ranges: Mapping[sympy.Symbol, tuple[int, int]],
        conditions: list[sympy.Basic],
    ) -> None:
        self.unknown, self.ranges, self.conditions = unknown, ranges, conditions
        self.tries = 0

    def run(self) -> dict[sympy.Basic, int] | None:
        return self._extend({}, self.conditions, 0)

    def _extend(
        self, chosen: dict[sympy.Basic, int], conditions: list[sympy.Basic], depth: int
    ) -> dict[sympy.Basic, int] | None:
        if depth == len(self.unknown):
            return chosen
        variable = self.unknown[depth]
        for value in self._candidates(variable, conditions):
            self.tries += 1
            if self.tries > MAX_TRIES:
                return None
            left = [c.xreplace({variable: sympy.Integer(value)}) for c in conditions]
            if any(c == sympy.false for c in left):
                continue
            found = self._extend({**chosen, variable: value}, [c for c in left if c != sympy.true], depth + 1)
            if found is not None:
                return found
        return None

    def _candidates(self, variable: sympy.Symbol, conditions: list[sympy.Basic]) -> Iterator[int]:
        low, high = self.ranges[variable]
        wished = [USUAL, *self._solutions(variable, conditions), high // 2, low + 2, low + 1, low, high, 4, 16, 64]
        yield from dict.fromkeys(value for value in wished if low <= value <= high)

    def _solutions(self, variable: sympy.Symbol, conditions: list[sympy.Basic]) -> Iterator[int]:
        """Values that an equation with no other unknown demands."""
        for condition in conditions:
            if isinstance(condition, sympy.Equality) and condition.free_symbols == {variable}:
                difference = condition.lhs - condition.rhs
                step = sympy.expand(difference.subs(variable, variable + 1) - difference)
                if step.is_Integer and step != 0:
                    value = -sympy.expand(difference.subs(variable, 0)) / step
                    if value.is_Integer:
                        yield int(value)


_LIMIT = 1 << 31


def _bounds(given: Any) -> tuple[int, int]:
    """A range of the tracer as ints; without an end, far enough."""

    def end(value: Any, default: int) -> int:
        return min(max(int(value), -_LIMIT), _LIMIT) if isinstance(value, sympy.Integer) else default

    return end(given.lower, -_LIMIT), end(given.upper, _LIMIT)


def _clamped(value: int, limits: tuple[int, int]) -> int:
    return min(max(value, limits[0]), limits[1])
