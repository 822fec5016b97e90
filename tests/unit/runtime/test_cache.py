from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from dcompile.errors import CacheError
from dcompile.runtime import cache as cache_module
from dcompile.runtime.cache import META, Cache, cache_key

KEY = cache_key("program", 1)


def write(text: str, built: list[str] | None = None):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        (folder / "host.py").write_text(text)
        if built is not None:
            built.append(text)

    return build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_an_entry_is_built_once_and_then_loaded(folder: Path) -> None:
    built: list[str] = []
    first = Cache(folder).fetch(KEY, write("a", built))
    again = Cache(folder)
    assert again.fetch(KEY, write("b", built)) == first
    assert (first / "host.py").read_text() == "a"
    assert built == ["a"]
    assert (again.counters.hits, again.counters.builds) == (1, 0)


def test_the_key_depends_on_every_part_and_on_their_borders() -> None:
    keys = {cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("ab", "c", 1)}
    assert len(keys) == 4
    with pytest.raises(CacheError, match="hexadecimal"):
        Cache(None).fetch("../../etc", write("a"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "extra", "meta"])
def test_a_corrupt_entry_is_rebuilt_with_a_warning(folder: Path, damage: str) -> None:
    entry = Cache(folder).fetch(KEY, write("good"))
    host = entry / "host.py"
    if damage == "flip":
        host.write_text("evil")
    elif damage == "truncate":
        host.write_text("")
    elif damage == "missing":
        host.unlink()
    elif damage == "extra":
        (entry / "more.so").write_text("x")
    else:
        (entry / META).write_text("{")
    cache = Cache(folder)
    with pytest.warns(RuntimeWarning, match="corrupt"):
        assert cache.fetch(KEY, write("new")) == entry
    assert host.read_text() == "new"
    assert cache.counters.corrupt == 1
    assert Cache(folder).fetch(KEY, write("unused")) == entry
    assert host.read_text() == "new"


@pytest.mark.parametrize("part", ["entry", "file", "parent"])
def test_what_others_could_have_written_is_not_loaded(folder: Path, part: str) -> None:
    entry = Cache(folder).fetch(KEY, write("good"))
    {"entry": entry, "file": entry / "host.py", "parent": entry.parent}[part].chmod(0o777)
    cache = Cache(folder)
    with pytest.warns(RuntimeWarning, match="written by other users"):
        found = cache.fetch(KEY, write("new"))
    assert (found / "host.py").read_text() == "new"
    assert cache.counters.untrusted == 1


def test_a_link_inside_an_entry_is_not_followed(folder: Path, tmp_path: Path) -> None:
    entry = Cache(folder).fetch(KEY, write("good"))
    (tmp_path / "other").write_text("good")
    (entry / "host.py").unlink()
    (entry / "host.py").symlink_to(tmp_path / "other")
    with pytest.warns(RuntimeWarning, match="link"):
        assert (Cache(folder).fetch(KEY, write("new")) / "host.py").read_text() == "new"
    assert (tmp_path / "other").read_text() == "good"


def test_an_open_cache_folder_means_a_private_one(folder: Path) -> None:
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    cache = Cache(folder)
    with pytest.warns(RuntimeWarning, match="written by other users"):
        found = cache.fetch(KEY, write("a"))
    assert folder not in found.parents
    assert (found / "host.py").read_text() == "a"
    assert found.stat().st_mode & 0o077 == 0
    assert cache.counters.private == 1


def test_another_owner_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(folder).fetch(KEY, write("a"))
    me = os.getuid()
    monkeypatch.setattr(cache_module.os, "getuid", lambda: me + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {me}"):
        found = Cache(folder).fetch(KEY, write("b"))
    assert folder not in found.parents


def test_a_folder_that_cannot_be_made_or_has_no_room_is_replaced(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert (cache.fetch(KEY, write("a")) / "host.py").exists()
    monkeypatch.setattr(cache_module, "MIN_FREE_BYTES", 2**62)
    cache = Cache(folder)
    with pytest.warns(RuntimeWarning, match="full"):
        cache.fetch(KEY, write("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same complaint is made once
        cache.fetch(KEY, write("a"))
    assert cache.counters.private == 2


def test_a_failed_build_leaves_nothing_behind(folder: Path) -> None:
    def build(into: Path) -> None:
        (into / "half").write_text("x")
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        Cache(folder).fetch(KEY, build)
    assert [path.name for path in folder.iterdir()] == ["locks"]
    assert Cache(folder).fetch(KEY, write("a")).is_dir()


def test_fetch_builds_again_what_has_been_removed(folder: Path) -> None:
    cache = Cache(folder)
    built: list[str] = []
    entry = cache.fetch(KEY, write("a", built))
    for gone in (entry / "host.py", entry, entry.parent, folder):
        found = cache.find(KEY)
        assert found == entry
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an entry that lacks a file is reported as corrupt
            assert cache.fetch(KEY, write("a", built)) == entry
        assert (entry / "host.py").read_text() == "a"
    assert len(built) == 5
    private = Cache(None)
    shutil.rmtree(private.fetch(KEY, write("a")))
    assert (private.fetch(KEY, write("b")) / "host.py").read_text() == "b"


@pytest.mark.parametrize("then", ["nothing", "another"])
def test_an_entry_that_is_removed_while_it_is_checked_is_no_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    entry = Cache(folder).fetch(KEY, write("a"))
    check = cache_module._fault

    def removed_meanwhile(checked: Path) -> tuple[bool, str] | None:
        monkeypatch.setattr(cache_module, "_fault", check)
        entry.rename(folder.parent / "aside")
        fault = check(checked)
        if then == "another":
            Cache(folder).fetch(KEY, write("another"))
        return fault

    monkeypatch.setattr(cache_module, "_fault", removed_meanwhile)
    cache = Cache(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache.fetch(KEY, write("b"))
    assert (found / "host.py").read_text() == {"nothing": "b", "another": "another"}[then]
    assert cache.counters.corrupt == 0


def test_a_cache_removed_during_a_build_means_a_private_folder(folder: Path) -> None:
    def build(into: Path) -> None:
        if folder in into.parents:
            shutil.rmtree(folder)
        (into / "host.py").write_text("a")

    cache = Cache(folder)
    with pytest.warns(RuntimeWarning, match="removed"):
        found = cache.fetch(KEY, build)
    assert (found / "host.py").read_text() == "a"
    assert cache.fetch(KEY, write("b")) == folder / KEY[:2] / KEY


def test_an_os_error_of_the_build_itself_is_raised(folder: Path) -> None:
    def build(into: Path) -> None:
        raise FileNotFoundError("no such tool")

    with pytest.raises(FileNotFoundError, match="no such tool"):
        Cache(folder).fetch(KEY, build)


EXITS = """
import gc, os, sys
from pathlib import Path
from dcompile.runtime.cache import Cache
def build(into):
    (into / "host.py").write_text("a")
made = Cache(None).fetch("0" * 64, build)
gc.collect()
assert (made / "host.py").read_text() == "a"
if os.fork() == 0:
    sys.exit()
os.wait()
assert made.exists(), "a child has removed it"
print(made)
"""


def test_private_folders_live_as_long_as_the_process_that_made_them() -> None:
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()


def test_no_locks_stay(folder: Path) -> None:
    Cache(folder).fetch(KEY, write("a"))
    with pytest.raises(ValueError, match="broken"):
        Cache(folder).fetch(cache_key("other"), _broken)
    assert not list((folder / "locks").iterdir())


def _broken(into: Path) -> None:
    raise ValueError("broken")


def test_leftovers_of_killed_builds_go(folder: Path) -> None:
    context = mp.get_context("fork")
    dead = context.Process(target=_rank, args=(folder, folder.parent / "log", True))
    dead.start()
    dead.join(60)
    (left,) = folder.glob("new-*")
    (left / "tmp").mkdir()
    Cache(folder, deadline_s=60).fetch(cache_key("young"), write("a"))
    assert left.exists()  # could be a build in progress on another machine
    os.utime(left, (time.time() - 61,) * 2)
    Cache(folder, deadline_s=60).fetch(cache_key("old"), write("a"))
    assert not left.exists()
    assert not list((folder / "locks").iterdir())


def test_a_build_in_progress_is_no_leftover(folder: Path) -> None:
    running: list[Path] = []

    def build(into: Path) -> None:
        running.append(into)
        os.utime(into, (0, 0))
        Cache(folder, deadline_s=1).fetch(cache_key("other"), write("b"))
        assert into.exists()
        assert (folder / "locks" / KEY).exists()
        (into / "host.py").write_text("a")

    assert (Cache(folder).fetch(KEY, build) / "host.py").read_text() == "a"
    assert not running[0].exists()


def test_a_waiter_does_not_take_a_removed_lock_for_held(folder: Path) -> None:
    """Its holder unlinks a lock; who waited for that inode must lock the file that has its name now."""
    Cache(folder).fetch(cache_key("other"), write("a"))
    order: list[str] = []

    def wait(name: str) -> None:
        with Cache(folder)._lock(folder, KEY, 30):
            order.append(name)
            held.append(name)
            time.sleep(0.1)
            assert held == [name]
            held.remove(name)

    held: list[str] = []
    with Cache(folder)._lock(folder, KEY, 1):
        threads = [threading.Thread(target=wait, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert sorted(order) == list("abcd")
    assert not held


def test_unfinished_builds_count_for_eviction(folder: Path) -> None:
    first = Cache(folder).fetch(KEY, write("a"))
    (folder / "new-0-x").mkdir()
    (folder / "new-0-x" / "kernels.o").write_text("x" * 5000)
    cache = Cache(folder, max_bytes=5000)
    cache.fetch(cache_key("other"), write("b"))
    assert not first.exists()


def test_the_least_recently_used_entries_go(folder: Path) -> None:
    cache = Cache(folder, max_bytes=5000)
    keys = [cache_key(n) for n in range(4)]
    for age, key in enumerate(keys[:3]):
        entry = cache.fetch(key, write("x" * 1200))
        os.utime(entry / META, (age, age))
    cache.fetch(keys[0], write("unused"))
    cache.fetch(keys[3], write("x" * 1200))
    there = [(folder / key[:2] / key).exists() for key in keys]
    assert there == [True, False, True, True]
    assert cache.counters.evictions == 1


def _rank(folder: Path, log: Path, die: bool) -> None:
    def build(into: Path) -> None:
        with log.open("a") as out:
            out.write("build\n")
        time.sleep(0.4)
        if die:
            os._exit(1)
        (into / "host.py").write_text("a")

    found = Cache(folder, deadline_s=60).fetch(KEY, build)
    assert (found / "host.py").read_text() == "a"
    assert folder in found.parents


def test_one_of_many_processes_builds(folder: Path, tmp_path: Path) -> None:
    context = mp.get_context("fork")
    ranks = [context.Process(target=_rank, args=(folder, tmp_path / "log", False)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert (tmp_path / "log").read_text() == "build\n"


def test_a_builder_that_dies_blocks_nobody(folder: Path, tmp_path: Path) -> None:
    context = mp.get_context("fork")
    dead = context.Process(target=_rank, args=(folder, tmp_path / "log", True))
    dead.start()
    dead.join(60)
    assert dead.exitcode == 1
    _rank(folder, tmp_path / "log", False)
    assert (tmp_path / "log").read_text() == "build\n" * 2


def test_a_lock_held_too_long_is_not_waited_for(folder: Path) -> None:
    Cache(folder).fetch(cache_key("other"), write("a"))
    cache = Cache(folder, deadline_s=0.1)
    with Cache(folder)._lock(folder, KEY, 1.0), pytest.warns(RuntimeWarning, match=r"more than 0\.1 s"):
        found = cache.fetch(KEY, write("b"))
    assert folder not in found.parents
    assert (found / "host.py").read_text() == "b"
