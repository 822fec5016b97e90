"""Who waits for whom: from what blocked ranks say of themselves to a deadlock that is certain.

A rank that has stood still for a while posts a ``Notice``: how many collectives it has launched in each group, how many
agreements it has made, and the one thing it waits for. Rank a needs rank b if b must still launch or make that thing.
A cycle of needs is a deadlock (Holt, Computing Surveys 1972): while the reader of the notices itself is blocked, its
own counts stand still, so the rank before it in the cycle is still blocked, and so on round the cycle. No clock is
involved.

It holds for programs that launch the collectives of one rank from one thread at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Notice:
    """What a rank says of itself.

    Attributes:
        doing: ``"waits"`` for a collective, ``"agrees"`` on a program, ``"compiles"``, or has ``"left"``.
        what: the collective, program or last words, for people.
        group: name of the process group it waits or agrees in; "" otherwise.
        number: of the collective it waits for, or of the agreement, from 1; 0 otherwise.
        members: global ranks of that group.
        launched: number of the last collective launched in each group.
        agreed: agreements this rank has come to in each group, the present one included.
        lines: the last collectives of ``group``: number and text.
    """

    doing: str
    what: str
    group: str = ""
    number: int = 0
    members: tuple[int, ...] = ()
    launched: Mapping[str, int] = field(default_factory=dict)
    agreed: Mapping[str, int] = field(default_factory=dict)
    lines: tuple[tuple[int, str], ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Notice:
        found = json.loads(text)
        found["members"] = tuple(found["members"])
        found["lines"] = tuple((number, line) for number, line in found["lines"])
        return Notice(**found)


def needs(waiting: Notice, rank: int, other: Notice | None) -> bool:
    """Whether ``waiting`` cannot go on before ``rank``, of which ``other`` is known, does something more."""
    if other is None or rank not in waiting.members:
        return False
    done = {"waits": other.launched, "agrees": other.agreed}.get(waiting.doing)
    return done is not None and done.get(waiting.group, 0) < waiting.number


def cycle(start: int, notices: Mapping[int, Notice]) -> list[int]:
    """A shortest cycle of needs through ``start``, in order, or the way to a rank that has left; empty if there is
    neither."""
    before: dict[int, int] = {start: start}
    queue = [start]
    for rank in queue:
        for other, notice in sorted(notices.items()):
            if other != rank and needs(notices[rank], other, notice):
                if other == start:
                    return _way(rank, before)
                if other not in before:
                    before[other] = rank
                    if notice.doing == "left":
                        return _way(other, before)
                    queue.append(other)
    return []


def _way(rank: int, before: Mapping[int, int]) -> list[int]:
    way = [rank]
    while before[way[-1]] != way[-1]:
        way.append(before[way[-1]])
    return way[::-1]


def first_difference(mine: Notice, theirs: Notice) -> tuple[int, str, str] | None:
    """The first number under which both launched something in the same group, but not the same thing."""
    if mine.group != theirs.group or not mine.group:
        return None
    others = dict(theirs.lines)
    return next(
        ((number, line, others[number]) for number, line in mine.lines if others.get(number, line) != line), None
    )


def explain(rank: int, notices: Mapping[int, Notice]) -> str | None:
    """Why ``rank``, which is blocked, will never go on; None if that is not certain."""
    mine = notices[rank]
    for other, notice in sorted(notices.items()):
        if other != rank and (found := first_difference(mine, notice)) is not None:
            number, own, different = found
            return (
                f"ranks launched different collectives in group {mine.group!r}; first difference at number {number}:\n"
                f"  rank {rank} (this rank): {own}\n  rank {other}: {different}"
            )
    way = cycle(rank, notices)
    if not way:
        return None
    head = "ranks wait for each other for ever:"
    if notices[way[-1]].doing == "left":
        head = f"rank {way[-1]} has left and is still needed:"
    lines = [f"  rank {r}{' (this rank)' if r == rank else ''} {describe(notices[r])}" for r in way]
    return "\n".join([head, *lines])


def describe(notice: Notice) -> str:
    """What the rank does, as the rest of a sentence."""
    if notice.doing == "waits":
        return f"waits for {notice.what}, number {notice.number} of group {notice.group!r}"
    if notice.doing == "agrees":
        return f"has compiled {notice.what} and waits for the others to compile it too"
    if notice.doing == "compiles":
        return f"is compiling {notice.what}"
    return f"has left: {notice.what}"


def report(members: tuple[int, ...], notices: Mapping[int, Notice]) -> str:
    """What is known of each rank, a line each."""
    silent = "says nothing: it runs code of its own, has stopped, or is gone"
    return "\n".join(
        f"  rank {rank} {describe(notices[rank]) if rank in notices else silent}" for rank in sorted(members)
    )
