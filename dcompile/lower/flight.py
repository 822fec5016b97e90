"""Collectives in flight while lowering: who is unwaited, and what may be touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import Unsupported
from dcompile.ir.types import Value

if TYPE_CHECKING:
    from dcompile.lower.builder import Lowering


@dataclass(frozen=True)
class InFlight:
    """Result ``position`` of a collective, before its wait. After the wait it stands for the result."""

    pending: str
    position: int


@dataclass(frozen=True)
class ViewInFlight:
    """A view op applied to an unwaited result; it is taken once the result has been waited for."""

    node: fx.Node
    of: InFlight


class Flights:
    """The open collectives of one graph."""

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self._open: dict[str, Start] = {}
        self._sources: dict[str, tuple[Value, ...]] = {}
        self._results: dict[str, tuple[Value, ...]] = {}
        self._locked: dict[str, str] = {}
        self._sent: dict[str, tuple[Value, tuple[Value, ...]]] = {}

    def launched(self, start: Start, sources: tuple[Value, ...]) -> tuple[InFlight, ...]:
        """Record a Start; gives a handle for each of its results."""
        name = start.pending.name
        self._open[name] = start
        self._sources[name] = sources
        self._results[name] = start.pending.results
        if start.pending.in_place:
            for source in sources:
                self._locked[self._lowering.root(source).name] = name
        return tuple(InFlight(name, n) for n in range(len(start.pending.results)))

    def sent(self, result: Value, kept: tuple[Value, ...]) -> None:
        """A send or receive gave ``result`` and uses ``kept`` until its wait."""
        self._sent[result.name] = (result, kept)

    def take_sent(self, result: Value) -> tuple[Value, ...] | None:
        """What the send or receive that gave ``result`` uses until now; None if none in flight did."""
        return self._sent.pop(result.name, (result, None))[1]

    def unfinished(self) -> tuple[Value, ...]:
        """Results of sends and receives that nobody waits for."""
        return tuple(result for result, _ in self._sent.values())

    def is_open(self, pending: str) -> bool:
        return pending in self._open

    def result(self, flight: InFlight) -> Value:
        """The waited result.

        Raises:
            Unsupported: it has not been waited for.
        """
        if self.is_open(flight.pending):
            self._refuse()
        return self._results[flight.pending][flight.position]

    def land(self, pending: str) -> None:
        """Emit the Wait of ``pending``; nothing if it has been waited for."""
        start = self._open.pop(pending, None)
        if start is None:
            return
        lowering = self._lowering
        lowering.emit(Wait(outs=start.pending.results, pending=pending, origin=lowering.origin | start.origin))
        if start.pending.in_place:
            for source, result in zip(self._sources[pending], start.pending.results, strict=True):
                self._locked.pop(lowering.root(source).name, None)
                lowering.supersede(source, result)

    def land_all(self) -> None:
        """Wait for everything still open, in launch order (the program never waited)."""
        for pending in tuple(self._open):
            self.land(pending)

    def settle(self, root: Value) -> None:
        """Before ``root`` is written: wait for every collective that still reads its storage."""
        lowering = self._lowering
        for pending in tuple(self._open):
            if any(lowering.root(source).name == root.name for source in self._sources[pending]):
                self.land(pending)

    def holder(self, value: Value) -> str | None:
        """The open in-place collective whose buffer ``value`` lives in."""
        return self._locked.get(self._lowering.root(value).name) if self._locked else None

    def check_readable(self, value: Value) -> None:
        if self._locked and self.holder(value) is not None:
            self._refuse()

    def _refuse(self) -> Any:
        raise Unsupported(
            self._lowering.origin,
            what="a read of a collective's result before its wait",
            instead="call wait_tensor on the result first",
        )
