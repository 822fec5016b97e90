"""The notice board: ranks that stand still say so in the store, so that their peers can tell what will never come.

Nothing is posted while all goes well. No collective is used: a rank that is blocked in one could not take part.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from dcompile.errors import Divergence, PeerGone
from dcompile.options import process_life
from dcompile.runtime.flights import FLIGHTS
from dcompile.runtime.waits import Notice, explain, report

PREFIX = "dcompile/board"

PATIENCE_S = 2.0
"""How long a wait is ordinary. Then the rank posts what it waits for: late enough to cost a healthy run nothing."""

LOOK_EVERY_S = 1.0
"""Between two looks at the others' notices."""

SHOWN_LINES = 50
"""Collectives a notice lists: a step of a large model with few buckets."""


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


def own_connection(store: Any, timeout_s: float) -> Any:
    """A second connection to ``store``: other threads do not wait for it, and none of its calls takes longer than
    ``timeout_s``. Stores that cannot be cloned are used as they are. Keys of a former life of the job are not seen.

    Raises:
        RuntimeError: the store does not answer. It is asked first, because connecting would be tried again and again.
    """
    usual, mine = store.timeout, timedelta(seconds=max(timeout_s, 1.0))
    store.set_timeout(mine)
    try:
        store.check([PREFIX])
        connection = store.clone() if hasattr(store, "clone") else store
        connection.set_timeout(mine)
        return dist.PrefixStore(f"dcompile-{process_life()}", connection)  # type: ignore[attr-defined]
    finally:
        store.set_timeout(usual)


class Board:
    """What the ranks of a world say of themselves.

    After the store has failed once it is left alone: an answer that came late would be taken for the next one's.

    Args:
        store: shared by all ranks, on a connection of its own.
        rank, world: of this process, global.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self.rank, self.world = store, rank, world
        self.process = os.getpid()
        self.agreed: Counter[str] = Counter()
        self.gone = False
        self._kept = False

    def post(self, notice: Notice | None) -> None:
        """Say what this rank does; None takes the notice away."""
        if self.gone:
            return
        self._kept = False
        try:
            self._store.set(f"{PREFIX}/{self.rank}", notice.to_json() if notice is not None else "")
        except RuntimeError:
            self.gone = True

    def keep(self) -> None:
        """Leave the notice of a wait that failed, for those who have not seen it yet, until ``moves_on``."""
        self._kept = True

    def moves_on(self) -> None:
        """This rank does something after a failed wait: its notice is out of date."""
        if self._kept:
            self.post(None)

    def read(self) -> dict[int, Notice]:
        """The notices of the other ranks that have posted one."""
        found: dict[int, Notice] = {}
        try:
            for rank in range(self.world):
                key = f"{PREFIX}/{rank}"
                if not self.gone and rank != self.rank and self._store.check([key]) and (text := self._store.get(key)):
                    found[rank] = Notice.from_json(text.decode())
        except RuntimeError:
            self.gone = True
        return found

    def blocked(self, doing: str, what: str, group: str, number: int, members: Iterable[int]) -> Notice:
        """The notice of this rank while it is blocked; arguments as in ``Notice``."""
        lines = tuple((flight.number, flight.line) for flight in FLIGHTS.recent(group, SHOWN_LINES))
        return Notice(doing, what, group, number, tuple(members), FLIGHTS.launched(), dict(self.agreed), lines)


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """While the block runs, ranks that wait for this one can see that it compiles ``what``."""
    announce_compile(what)
    try:
        yield
    finally:
        announce_compile(None)


def announce_compile(what: str | None) -> None:
    """Let ranks that wait for this one see that it compiles ``what``; None: that it does not any more."""
    if (here := board()) is not None:
        launched, agreed = FLIGHTS.launched(), dict(here.agreed)
        here.post(None if what is None else Notice("compiles", what, launched=launched, agreed=agreed))


class Lookout:
    """Accompanies one wait: says what this rank waits for once it takes long, and looks whether it can ever end.

    Args:
        board: None if there is nobody to look at.
        notice: of this rank, made when it is needed.
    """

    def __init__(self, board: Board | None, notice: Callable[[Board], Notice]) -> None:
        self._board = board
        self._make = notice
        self._mine: Notice | None = None
        self._next = time.monotonic() + PATIENCE_S

    def seconds(self) -> float:
        """Until ``look`` has something to do."""
        return max(self._next - time.monotonic(), 0.0) if self._board is not None else float("inf")

    def look(self) -> None:
        """Post, at the first time, and read.

        Raises:
            Divergence: this wait will never end, because of what the ranks launched or compiled; names the difference.
            PeerGone: a rank that is needed has left.
        """
        if self._board is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_EVERY_S
        if self._mine is None:
            self._mine = self._make(self._board)
            self._board.post(self._mine)
        others = self._board.read()
        if (why := explain(self._board.rank, {**others, self._board.rank: self._mine})) is not None:
            raise (PeerGone if "has left" in why.splitlines()[0] else Divergence)(f"{why}\n{ADVICE}")

    def report(self, members: Sequence[int]) -> str:
        """What is known of the other ranks of a group, a line each."""
        if self._board is None:
            return ""
        others = self._board.read()
        if self._board.gone:
            return "  the store does not answer: the process that hosts it has ended or stands still"
        return report(tuple(rank for rank in members if rank != self._board.rank), others)

    def done(self) -> None:
        """The wait is over. Called while an error leaves it, the others still see what this rank waited for."""
        if self._mine is not None and self._board is not None:
            if sys.exception() is None:
                self._board.post(None)
            else:
                self._board.keep()


ADVICE = (
    "every rank must launch the same collectives in the same order: give all ranks the same shapes (pad or drop the "
    "last batch), or compile with dynamic=True, and keep branches that depend on the rank out of compiled code"
)

_current: list[tuple[weakref.ref[Any], Board | None]] = []
_resets: list[Callable[[], None]] = [FLIGHTS.forget]


def at_new_world(reset: Callable[[], None]) -> Callable[[], None]:
    """Have ``reset`` called when a new default process group is met: what was agreed with the old one is void."""
    _resets.append(reset)
    return reset


def board() -> Board | None:
    """This process's board; None without a process group, alone, or without a store."""
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is None:
        return None
    if not _current or _current[0][0]() is not world:
        if _current:
            for reset in _resets:
                reset()
        _current[:] = [(weakref.ref(world), _make_board(world))]
    return _current[0][1]


def _make_board(world: dist.ProcessGroup) -> Board | None:
    if dist.get_world_size(world) == 1:
        return None
    try:
        store = own_connection(world.get_group_store(), STORE_TIMEOUT_S)
    except (AttributeError, RuntimeError):
        return None
    return Board(store, dist.get_rank(world), dist.get_world_size(world))


STORE_TIMEOUT_S = 30.0
"""Longest wait for an answer of the store; it answers in milliseconds, in seconds on a machine that is overloaded."""


def leave() -> None:
    """Leave last words for those who still wait. Called when the process ends; a kill leaves none."""
    here = _current[0][1] if _current else None
    if here is None or here.process != os.getpid():
        return
    error = getattr(sys, "last_value", None)
    words = f"{type(error).__name__}: {error}".splitlines()[0] if error is not None else "its program ended"
    here.post(Notice("left", words, launched=FLIGHTS.launched(), agreed=dict(here.agreed)))


atexit.register(leave)
