"""One rank compiles a program, the others load what it made: from the shared cache folder, or through the store.

The first rank that asks for a key becomes its builder; a key holds all a program depends on and no rank, so ranks with
the same graph have the same key, and a rank that recompiles alone builds for itself. Nobody depends on a builder: one
that fails, or gives no sign of life, or sends something damaged, is given up, and the rank compiles by itself.

What arrives through the store is code. It is as trustworthy as the objects that ``torch.distributed`` itself pickles
through the same store, and no less.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dcompile.runtime.board import STORE_TIMEOUT_S, at_new_world, board, own_connection
from dcompile.runtime.cache import META, Cache

PREFIX = "dcompile/once"

CHUNK_BYTES = 2**20
"""Bytes of one value: TCPStore takes at most 8 MiB."""

BEAT_S = 1.0
"""A builder gives a sign of life this often."""

SILENCE_S = 30.0
"""A builder that has been silent for so long has been killed or stopped; threads of an overloaded machine may well be
late by seconds."""

POLL_S = 0.05


class Place:
    """Where the ranks of a world meet to compile once.

    Args:
        store: shared by all ranks, on a connection of its own.
        rank, world: of this process.
        identity: of this rank's cache folder; "" if it has none to share.
        silence_s: when a silent builder is given up; None for ``SILENCE_S``.
    """

    def __init__(self, store: Any, rank: int, world: int, identity: str, silence_s: float | None = None) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._identity, self._silence_s = identity, SILENCE_S if silence_s is None else silence_s
        self._sharing: bool | None = None
        store.set(f"{PREFIX}/cache/{rank}", identity or f"none {rank}")

    def join(self, key: str) -> Building | None:
        """This rank's building of ``key``, which ``finish`` ends; None if another rank builds it, to ``receive``."""
        if self._store.add(f"{PREFIX}/{key}/claims", 1) > 1:
            return None
        return Building(self._store, key, self._publish)

    def offer(self, key: str, entry: Path) -> None:
        """Give ranks that do not share this rank's folder an entry it already has, unless somebody builds it."""
        if not self._all_share() and (building := self.join(key)) is not None:
            building.finish(entry)

    def _publish(self, key: str, entry: Path | None) -> None:
        if entry is None:
            self._store.set(f"{PREFIX}/{key}/done", json.dumps({"failed": True}))
            return
        chunks, digest = 0, ""
        if not self._all_share():
            packed = pack(entry)
            digest = hashlib.sha256(packed).hexdigest()
            chunks = -(-len(packed) // CHUNK_BYTES)
            for n in range(chunks):
                self._store.set(f"{PREFIX}/{key}/{n}", packed[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES])
        self._store.set(f"{PREFIX}/{key}/done", json.dumps({"failed": False, "chunks": chunks, "sha256": digest}))

    def _all_share(self) -> bool:
        """Whether every rank is known to use this rank's cache folder."""
        if self._sharing is None and self._identity:
            keys = [f"{PREFIX}/cache/{rank}" for rank in range(self._world)]
            if self._store.check(keys):  # every rank has said which folder it uses, and keeps to it
                self._sharing = all(self._store.get(key).decode() == self._identity for key in keys)
        return bool(self._sharing)

    def receive(self, key: str, cache: Cache, deadline_s: float) -> Path | None:
        """The folder of ``key``, which another rank builds; None if that fails, and this rank has to compile."""
        try:
            facts = self._wait(key, deadline_s)
            if facts is None or facts["failed"]:
                return None
            if (found := cache.find(key)) is not None:
                return found
            packed = b"".join(self._store.get(f"{PREFIX}/{key}/{n}") for n in range(facts["chunks"]))
            damaged = hashlib.sha256(packed).hexdigest() != facts["sha256"]
        except (RuntimeError, ValueError, KeyError, TypeError):
            return None
        if not packed or damaged:
            cache.counters.corrupt += bool(packed)
            return None
        return cache.fetch(key, lambda folder: unpack(packed, folder))

    def published(self, key: str, cache: Cache, deadline_s: float) -> Path | None:
        """``receive``, if ``key`` is there to be received; waits for nobody."""
        if not self._store.check([f"{PREFIX}/{key}/done"]):
            return None
        return self.receive(key, cache, deadline_s)

    def _wait(self, key: str, deadline_s: float) -> Any:
        """What the builder says at the end; None if it falls silent."""
        until = time.monotonic() + deadline_s
        beats, heard = -1, time.monotonic()
        while time.monotonic() < until:
            if self._store.check([f"{PREFIX}/{key}/done"]):
                return json.loads(self._store.get(f"{PREFIX}/{key}/done"))
            now = self._store.add(f"{PREFIX}/{key}/beats", 0)
            if now != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > self._silence_s:
                return None
            time.sleep(POLL_S)
        return None


class Building:
    """A build that others wait for. Until ``finish`` a thread gives signs of life."""

    def __init__(self, store: Any, key: str, publish: Callable[[str, Path | None], None]) -> None:
        self._store, self._key, self._publish = store, key, publish
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dcompile-beat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._done.wait(BEAT_S):
                self._store.add(f"{PREFIX}/{self._key}/beats", 1)

    def finish(self, entry: Path | None) -> None:
        """Hand the entry to ranks that do not share its folder; None tells them to compile by themselves."""
        self._done.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError, OSError):  # the others notice the silence
            self._publish(self._key, entry)


def pack(entry: Path) -> bytes:
    """The files of a cache entry as one text, without what belongs to the folder it was in."""
    paths = [path for path in sorted(entry.iterdir()) if path.name != META]
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
    return json.dumps(files).encode()


def unpack(packed: bytes, folder: Path) -> None:
    """Write what ``pack`` made into ``folder``.

    Raises:
        ValueError: a name is not that of a file in the folder itself.
    """
    for name, text in json.loads(packed).items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not the name of a file")
        (folder / name).write_bytes(base64.b64decode(text))


_places: dict[Path, Place] = {}
at_new_world(_places.clear)


def meeting_place(cache: Cache) -> Place | None:
    """Where this process compiles once; None without peers, without a store, or without a cache folder."""
    here = board()  # which notices a new process group
    if here is None or cache.folder is None or here.gone:
        return None
    world = dist.group.WORLD
    assert world is not None, "there is a board"
    try:
        if cache.folder not in _places:
            store = own_connection(world.get_group_store(), STORE_TIMEOUT_S)
            _places[cache.folder] = Place(store, here.rank, here.world, cache.identity())
        return _places[cache.folder]
    except (AttributeError, RuntimeError):
        return None
