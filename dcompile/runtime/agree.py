"""Ranks make sure that they compiled the same program before its first launch, without a collective.

Fingerprints travel through the key-value store of the process group, so a rank that has another program, or none,
is named in an error; a mismatched collective would hang instead.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch.distributed as dist

from dcompile.errors import CompilerBug, DCompileError, DeadlineExceeded, Divergence, PeerGone
from dcompile.runtime.board import Board, Lookout, at_new_world, board, own_connection
from dcompile.runtime.comm import Team
from dcompile.runtime.waits import Notice

PREFIX = "dcompile/agree"
LINE_DIGEST_CHARS = 16


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


_made: Counter[str] = Counter()
_agreed: dict[str, set[str]] = {}


@at_new_world
def forget() -> None:
    """What was agreed with the ranks of a former process group does not bind those of a new one."""
    _made.clear()
    _agreed.clear()


def next_key(group: str) -> str:
    """The key of the next agreement in ``group``: its number, equal on all ranks that have made equally many.

    Programs without collectives make none, so a rank may compile as many of those as it likes.
    """
    number = _made[group]
    _made[group] += 1
    return str(number)


def group_store(group: dist.ProcessGroup) -> Store:
    """The key-value store of a process group.

    ``ProcessGroup.get_group_store`` is public and gives a store that is prefixed for this group; the default store
    of ``torch.distributed`` itself can only be had through a private function.

    Raises:
        CompilerBug: this process group has none.
    """
    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError) as error:
        raise CompilerBug(f"process group {group.group_name!r} has no store: {error}") from error


def agree_on(teams: Mapping[str, Team], graph: str, fingerprint: str, lines: Sequence[str], deadline_s: float) -> None:
    """``agree`` in every group that the program communicates in; see there.

    Launches a group has agreed on before are not asked about again: every rank of the group knows them, so a rank that
    recompiles alone (for its own batch size, say) into the same launches does not wait for the others.
    """
    here = board()
    for label in sorted(teams):
        team = teams[label]
        group = str(team.process_group.group_name)
        known = _agreed.setdefault(group, set())
        if team.size > 1 and fingerprint not in known:
            key = f"{graph}/{next_key(group)}"
            try:
                store = own_connection(group_store(team.process_group), deadline_s)
            except RuntimeError as error:
                raise _store_gone(team.rank, graph, error) from error
            lookout = Lookout(here, partial(_notice, graph, group, team.place.ranks, lines))
            if here is not None:
                here.moves_on()
                here.agreed[group] = _made[group]
            agree(fingerprint, lines, store, team.rank, team.size, deadline_s, key, lookout)
            known.add(fingerprint)


def _notice(graph: str, group: str, members: Sequence[int], lines: Sequence[str], here: Board) -> Notice:
    return here.blocked("agrees", f"{graph}{_first_collective(lines)}", group, here.agreed[group], members)


def _first_collective(lines: Sequence[str]) -> str:
    """Part of a sentence that tells which program is meant; "" for one without collectives."""
    collectives = [line for line in lines if "(" in line.split("  # ")[0]]
    return f", whose first collective is {collectives[0].strip()}," if collectives else ""


def agree(
    fingerprint: str,
    lines: Sequence[str],
    store: Store,
    rank: int,
    world: int,
    deadline_s: float,
    key: str,
    lookout: Lookout | None = None,
) -> None:
    """Return when all ranks have come with the same ``fingerprint``.

    Args:
        fingerprint: of the canonical program.
        lines: its text, one line a step; only compared when fingerprints differ.
        store: shared by the ranks.
        rank, world: of this process, among the ranks that must agree.
        deadline_s: longest wait for the others, in seconds.
        key: ``graph/number``; the number is unique to this agreement and the same on all ranks, the graph's name is for
            messages and may differ.
        lookout: sees when the others cannot come any more.

    Raises:
        Divergence: on every rank, naming who differs and the first differing line.
        DeadlineExceeded: naming the ranks that did not come.
        PeerGone: a rank has left, or the store does not answer.
    """
    until = time.monotonic() + deadline_s
    exchange = _Exchange(store, rank, world, until, deadline_s, key, lookout or Lookout(None, _nobody))
    exchange.about = _first_collective(lines)
    prints = exchange.all("fingerprint", fingerprint)
    if len(set(prints)) == 1:
        return
    digests: list[list[str]] = [json.loads(text) for text in exchange.all("lines", json.dumps(_digests(lines)))]
    first = _first_difference(digests)
    texts = exchange.all("text", lines[first] if first < len(lines) else "(the program ends here)")
    raise Divergence(_describe(key, prints, first, texts, rank))


def _digests(lines: Sequence[str]) -> list[str]:
    return [hashlib.sha256(line.encode()).hexdigest()[:LINE_DIGEST_CHARS] for line in lines]


def _first_difference(digests: Sequence[Sequence[str]]) -> int:
    shortest = min(len(d) for d in digests)
    return next((n for n in range(shortest) if len({d[n] for d in digests}) > 1), shortest)


def _describe(key: str, prints: Sequence[str], line: int, texts: Sequence[str], rank: int) -> str:
    """Who has which program, the majority's first."""
    camps: dict[str, list[int]] = {}
    for member, value in enumerate(prints):
        camps.setdefault(value, []).append(member)
    parts = [f"ranks compiled different programs for {key.split('/')[0]}; first difference at line {line + 1}:"]
    for camp in sorted(camps.values(), key=lambda ranks: (-len(ranks), ranks)):
        who = f"rank{'s' if len(camp) > 1 else ''} {', '.join(map(str, camp))}"
        parts.append(f"  {who}{' (this rank)' if rank in camp else ''}: {texts[camp[0]].strip()}")
    parts.append(
        "make the model, its inputs' shapes and the options equal on all ranks; if only their compute differs, "
        "Options(bucket_bytes=...) keeps it from changing the buckets"
    )
    return "\n".join(parts)


def _store_gone(rank: int, graph: str, error: RuntimeError) -> PeerGone:
    return PeerGone(
        f"rank {rank}: the store does not answer while ranks agree on {graph}: the process that hosts it (rank 0, or "
        f"the launcher) has ended or stands still ({error})"
    )


def _nobody(_: Board) -> Notice:
    raise CompilerBug("there is no board to post on")


def exchange(team: Team, deadline_s: float, key: str) -> _Exchange:
    """A conversation of all ranks of ``team`` through its store, with one deadline.

    Args:
        key: ``topic/number``; the number is unique to this conversation in the group and the same on all ranks.
    """
    store = own_connection(group_store(team.process_group), deadline_s)
    topic, _, number = key.rpartition("/")
    until = time.monotonic() + deadline_s
    key = f"{topic}/{topic}{number}"
    return _Exchange(store, team.rank, team.size, until, deadline_s, key, Lookout(None, _nobody))


FIRST_POLL_S, LONGEST_POLL_S = 0.001, 0.1
"""Between two questions to the store: short for ranks that come together, seldom for those that wait for a compile."""


class _Exchange:
    """Every rank publishes a value and reads everybody's."""

    def __init__(
        self, store: Store, rank: int, world: int, until: float, deadline_s: float, key: str, lookout: Lookout
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._until, self._deadline_s, self._key, self._lookout = until, deadline_s, key, lookout
        self.about = ""
        """More about the program, for messages."""

    def all(self, topic: str, value: str) -> list[str]:
        """The values of all ranks in rank order."""
        number = self._key.rpartition("/")[2]
        keys = [f"{PREFIX}/{number}/{topic}/{rank}" for rank in range(self._world)]
        try:
            self._store.set(keys[self._rank], value)
            self._wait(keys)
            return [self._store.get(key).decode() for key in keys]
        except DCompileError:
            raise
        except RuntimeError as error:
            raise _store_gone(self._rank, self._key.split("/")[0], error) from error
        finally:
            self._lookout.done()

    def _wait(self, keys: list[str]) -> None:
        pause = FIRST_POLL_S
        while not self._store.check(keys):
            if time.monotonic() >= self._until:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                program = self._key.split("/")[0] + self.about
                raise DeadlineExceeded(
                    f"rank {self._rank}: rank{'s' if len(missing) != 1 else ''} {', '.join(map(str, missing)) or '?'} "
                    f"did not come with a program for {program} within {self._deadline_s:g} s; "
                    f"every rank must compile it, equally often\n{self._lookout.report(missing)}".rstrip()
                )
            self._lookout.look()
            time.sleep(min(pause, max(self._until - time.monotonic(), 0.0)))
            pause = min(1.5 * pause, LONGEST_POLL_S)
