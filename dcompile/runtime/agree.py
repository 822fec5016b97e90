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
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from dcompile.errors import CompilerBug, DeadlineExceeded, Divergence
from dcompile.runtime.comm import SHORTEST_WAIT_S, Team

PREFIX = "dcompile/agree"
LINE_DIGEST_CHARS = 16


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


_made: Counter[str] = Counter()
_agreed: dict[str, set[str]] = {}


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
    for label in sorted(teams):
        team = teams[label]
        group = str(team.process_group.group_name)
        known = _agreed.setdefault(group, set())
        if team.size > 1 and fingerprint not in known:
            key = f"{graph}/{next_key(group)}"
            agree(fingerprint, lines, group_store(team.process_group), team.rank, team.size, deadline_s, key)
            known.add(fingerprint)


def agree(
    fingerprint: str, lines: Sequence[str], store: Store, rank: int, world: int, deadline_s: float, key: str
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

    Raises:
        Divergence: on every rank, naming who differs and the first differing line.
        DeadlineExceeded: naming the ranks that did not come.
    """
    until = time.monotonic() + deadline_s
    exchange = _Exchange(store, rank, world, until, deadline_s, key)
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


class _Exchange:
    """Every rank publishes a value and reads everybody's."""

    def __init__(self, store: Store, rank: int, world: int, until: float, deadline_s: float, key: str) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._until, self._deadline_s, self._key = until, deadline_s, key

    def all(self, topic: str, value: str) -> list[str]:
        """The values of all ranks in rank order."""
        number = self._key.rpartition("/")[2]
        keys = [f"{PREFIX}/{number}/{topic}/{rank}" for rank in range(self._world)]
        self._store.set(keys[self._rank], value)
        left = timedelta(seconds=max(self._until - time.monotonic(), SHORTEST_WAIT_S))
        try:
            self._store.wait(keys, left)
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self._has(key)]
            raise DeadlineExceeded(
                f"rank {self._rank}: rank{'s' if len(missing) != 1 else ''} {', '.join(map(str, missing)) or '?'} "
                f"did not come with a program for {self._key.split('/')[0]} within {self._deadline_s:g} s; "
                "every rank must compile it, equally often"
            ) from error
        return [self._store.get(key).decode() for key in keys]

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except RuntimeError:
            return False
