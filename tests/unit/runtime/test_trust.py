from __future__ import annotations

import grp
import os
import pwd
import warnings
from pathlib import Path

import pytest

from dcompile.runtime import trust
from dcompile.runtime.cache import Cache, cache_key

KEY = cache_key("program", 1)


def write(text: str):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        (folder / "host.py").write_text(text)

    return build


@pytest.mark.parametrize(("mode", "trusted"), [(0o755, True), (0o1777, True), (0o777, False), (0o775, False)])
def test_folders_above_the_cache_must_be_safe_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, trusted: bool
) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: False)
    above = tmp_path / "above"
    folder = above / "between" / "cache"
    entry = Cache(folder).fetch(KEY, write("a"))
    above.chmod(mode)
    (tmp_path / "link").symlink_to(above)
    for path in (folder, tmp_path / "link" / "between" / "cache"):
        cache = Cache(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert (cache.find(KEY) is not None) is trusted
            assert cache.fetch(KEY, write("b")).samefile(entry) is trusted
        assert [f"folder {path.parents[1]} can be written by other users" in str(c.message) for c in caught] == (
            [] if trusted else [True]
        )


def test_a_link_on_the_way_to_the_cache_must_be_safe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: False)
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "second").symlink_to(tmp_path / "real")
    (tmp_path / "first").symlink_to("open/second")
    (tmp_path / "open").chmod(0o777)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path / 'open'} can be written by other users"):
        assert tmp_path not in Cache(tmp_path / "first" / "cache").fetch(KEY, write("a")).parents


def test_a_folder_above_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give folders away")
    above = tmp_path / "above"
    above.mkdir(mode=0o755)
    os.chown(above, 12345, 12345)
    with pytest.warns(RuntimeWarning, match=r"above belongs to user 12345"):
        assert above not in Cache(above / "cache").fetch(KEY, write("a")).parents


def test_a_group_of_the_user_alone_may_write_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_is_private_group", lambda gid: gid == tmp_path.stat().st_gid)
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o775)
    assert Cache(tmp_path / "above" / "cache").fetch(KEY, write("a")) == tmp_path / "above" / "cache" / KEY[:2] / KEY


def test_private_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.struct_passwd(("ann", "x", os.getuid(), 77, "", "", ""))
    monkeypatch.setattr(trust.pwd, "getpwuid", lambda uid: user)
    groups = {77: ("ann", ["ann"]), 78: ("ann", []), 79: ("staff", [])}

    def getgrgid(gid: int) -> grp.struct_group:
        name, members = groups[gid]
        return grp.struct_group((name, "x", gid, members))

    monkeypatch.setattr(trust.grp, "getgrgid", getgrgid)
    assert trust._is_private_group(77)
    assert not trust._is_private_group(78)
    groups[77] = ("ann", ["ann", "bob"])
    assert not trust._is_private_group(77)
    groups[77] = ("users", [])
    assert not trust._is_private_group(77)
    del groups[77]
    assert not trust._is_private_group(77)
