"""A map from byte positions to values that is constant on stretches; what the verifier simulates memory with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteMap(Generic[T]):
    """Every byte from 0 on has a value, ``default`` at first. Operations take time logarithmic in the number of
    stretches plus linear in those touched."""

    def __init__(self, default: T) -> None:
        self._starts = [0]
        self._values = [default]

    def set(self, start: int, stop: int, value: T) -> None:
        """Give all bytes of ``[start, stop)`` one value."""
        if start < stop:
            first, last = self._cut(start), self._cut(stop)
            self._starts[first:last] = [start]
            self._values[first:last] = [value]

    def update(self, start: int, stop: int, change: Callable[[T], T]) -> None:
        """Replace each value in ``[start, stop)`` by ``change`` of it; equal neighbours become one stretch."""
        if start >= stop:
            return
        first, last = self._cut(start), self._cut(stop)
        self._values[first:last] = [change(value) for value in self._values[first:last]]
        for at in range(min(last, len(self._starts) - 1), max(first - 1, 0), -1):
            if self._values[at] == self._values[at - 1]:
                del self._starts[at], self._values[at]

    def over(self, start: int, stop: int) -> Iterator[tuple[int, int, T]]:
        """The stretches of ``[start, stop)`` as (start, stop, value), ascending."""
        if start >= stop:
            return
        at = bisect_right(self._starts, start) - 1
        while at < len(self._starts) and self._starts[at] < stop:
            end = self._starts[at + 1] if at + 1 < len(self._starts) else stop
            yield max(start, self._starts[at]), min(stop, end), self._values[at]
            at += 1

    def _cut(self, position: int) -> int:
        """Make a stretch begin at ``position``; returns its number."""
        at = bisect_left(self._starts, position)
        if at == len(self._starts) or self._starts[at] != position:
            self._starts.insert(at, position)
            self._values.insert(at, self._values[at - 1])
        return at
