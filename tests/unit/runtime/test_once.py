"""One rank builds, the others get it: by the shared folder, through the store, or by themselves after all."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcompile.runtime import once
from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.once import PREFIX, Place, pack, unpack

KEY = cache_key("some program")


def fill(folder: Path) -> None:
    (folder / "host.py").write_text("call = 1\n")
    (folder / "kernels.so").write_bytes(bytes(range(256)) * 9000)  # more than two chunks


class Rank:
    def __init__(self, store: Any, rank: int, folder: Path, silence_s: float = 20.0) -> None:
        self.cache = Cache(folder)
        self.place = Place(store, rank, 2, self.cache.identity(), silence_s)

    def receive(self, deadline_s: float = 20.0) -> Path | None:
        return self.place.receive(KEY, self.cache, deadline_s)


def ranks(tmp_path: Path, shared: bool, **more: Any) -> tuple[Any, Rank, Rank]:
    store = dist.HashStore()
    folders = [tmp_path / "cache"] * 2 if shared else [tmp_path / "one", tmp_path / "two"]
    return store, Rank(store, 0, folders[0]), Rank(store, 1, folders[1], **more)


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "through the store"])
def test_the_second_rank_gets_what_the_first_builds(tmp_path: Path, shared: bool) -> None:
    store, first, second = ranks(tmp_path, shared)
    building = first.place.join(KEY)
    assert building is not None
    assert second.place.join(KEY) is None
    got: list[Path | None] = []
    waiting = threading.Thread(target=lambda: got.append(second.receive()))
    waiting.start()
    made = first.cache.fetch(KEY, fill)
    building.finish(made)
    waiting.join(30)
    (entry,) = got
    assert entry is not None
    assert (entry == made) is shared
    assert (entry / "kernels.so").read_bytes() == (made / "kernels.so").read_bytes()
    assert second.cache.counters.builds == (0 if shared else 1)
    assert store.check([f"{PREFIX}/{KEY}/0"]) is not shared, "what is shared already is not sent"


def test_a_failed_build_and_a_silent_builder_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first, second = ranks(tmp_path, shared=False)
    building = first.place.join(KEY)
    assert building is not None
    building.finish(None)
    assert second.receive() is None
    monkeypatch.setattr(once, "BEAT_S", 1000.0)  # as if it had been stopped
    _, first, second = ranks(tmp_path, shared=False, silence_s=0.3)
    assert first.place.join(KEY) is not None
    assert second.receive() is None


def test_a_builder_that_gives_signs_of_life_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "BEAT_S", 0.1)
    _, first, second = ranks(tmp_path, shared=False, silence_s=5.0)
    building = first.place.join(KEY)
    assert building is not None
    assert second.receive(deadline_s=1.0) is None, "but not beyond the deadline"
    building.finish(first.cache.fetch(KEY, fill))
    assert second.receive() is not None


def test_damage_on_the_way_is_noticed(tmp_path: Path) -> None:
    store, first, second = ranks(tmp_path, shared=False)
    building = first.place.join(KEY)
    assert building is not None
    building.finish(first.cache.fetch(KEY, fill))
    store.set(f"{PREFIX}/{KEY}/1", store.get(f"{PREFIX}/{KEY}/1")[:-1] + b"?")
    assert second.receive() is None
    assert second.cache.counters.corrupt == 1
    store.set(f"{PREFIX}/{KEY}/done", "no JSON")
    assert second.receive() is None


def test_files_outside_the_folder_are_refused(tmp_path: Path) -> None:
    for name in ("../evil", "/tmp/evil", "a/b", "", ".."):
        with pytest.raises(ValueError, match="is not the name of a file"):
            unpack(json.dumps({name: ""}).encode(), tmp_path)
    fill(tmp_path)
    (tmp_path / "meta.json").write_text("of the folder, not of the program")
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "other").rmdir()
    packed = pack(tmp_path)
    other.mkdir()
    unpack(packed, other)
    assert {path.name for path in other.iterdir()} == {"host.py", "kernels.so"}


def test_folders_have_identities(tmp_path: Path) -> None:
    one, two = Cache(tmp_path / "a"), Cache(tmp_path / "b")
    assert one.identity() == Cache(tmp_path / "a").identity() != two.identity()
    assert Cache(None).identity() == ""
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    assert Cache(tmp_path / "open").identity() == "", "a folder that others can write is not shared"
