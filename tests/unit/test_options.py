"""Options from the environment and from the caller."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dcompile.errors import DCompileError
from dcompile.options import ALLOCATOR_VARIABLES, Options, allocator_is_tuned, default_cache_dir, process_rank


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "DCOMPILE_DUMP", *(f"DCOMPILE_{field.name.upper()}" for field in fields(Options))):
        monkeypatch.delenv(name, raising=False)


READ = {
    "eager_ops": ("EAGER_OPS", "exp, aten.sin.default,", frozenset({"exp", "aten.sin.default"})),
    "skip": ("SKIP", "overlap", frozenset({"overlap"})),
    "show": ("SHOW", "passes,ir", frozenset({"passes", "ir"})),
    "dump_dir": ("DUMP", "some/folder", Path("some/folder")),
    "cache_dir": ("CACHE_DIR", "a/cache", Path("a/cache")),
    "bucket_bytes": ("BUCKET_BYTES", "4096", 4096),
    "in_flight_bytes": ("IN_FLIGHT_BYTES", "1048576", 1048576),
    "peak_memory_bytes": ("PEAK_MEMORY_BYTES", "1073741824", 2**30),
    "deadline_s": ("DEADLINE_S", "2.5", 2.5),
    "flight_dir": ("FLIGHT_DIR", "some/flights", Path("some/flights")),
    "progress_dir": ("PROGRESS_DIR", "some/progress", Path("some/progress")),
    "topology": ("TOPOLOGY", "some/cluster.toml", Path("some/cluster.toml")),
    "compile_once": ("COMPILE_ONCE", "0", False),
    "verify_cross_rank": ("VERIFY_CROSS_RANK", "0", False),
    "cxx": ("CXX", "clang++ -v", "clang++ -v"),
    "assert_layouts": ("ASSERT_LAYOUTS", "0", False),
    "tracebacks": ("TRACEBACKS", "1", True),
    "timeline": ("TIMELINE", "TRUE", True),
    "cuda_graphs": ("CUDA_GRAPHS", "1", True),
    "autotune": ("AUTOTUNE", "1", True),
    "freeze": ("FREEZE", "1", True),
    "keep_memory": ("KEEP_MEMORY", "0", False),
}
"""Each option: its variable without the prefix, a text for it, and what the text means."""


def test_every_option_can_be_set_in_the_environment() -> None:
    assert READ.keys() == {field.name for field in fields(Options)}


@pytest.mark.parametrize("name", READ)
def test_the_environment_sets_one_option_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Options.from_env()
    variable, text, meaning = READ[name]
    assert getattr(before, name) != meaning
    monkeypatch.setenv(f"DCOMPILE_{variable}", text)
    assert Options.from_env() == replace(before, **{name: meaning})


@pytest.mark.parametrize("name", READ)
def test_the_caller_comes_before_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, text, meaning = READ[name]
    usual = getattr(Options(), name)
    monkeypatch.setenv(f"DCOMPILE_{variable}", text)
    assert getattr(Options.from_env({name: usual}), name) == usual
    monkeypatch.delenv(f"DCOMPILE_{variable}")
    assert getattr(Options.from_env({name: meaning}), name) == meaning


@pytest.mark.parametrize(
    ("name", "text"),
    [("bucket_bytes", "1e6"), ("in_flight_bytes", ""), ("deadline_s", "soon"), ("timeline", "maybe"), ("skip", None)],
)
def test_a_value_that_cannot_be_read_is_named(name: str, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is None:
        with pytest.raises(DCompileError, match=r"'skips'.*skip"):
            Options.from_env({"skips": {"overlap"}})
        return
    monkeypatch.setenv(f"DCOMPILE_{name.upper()}", text)
    with pytest.raises(DCompileError, match=f"DCOMPILE_{name.upper()}={text!r} cannot be read"):
        Options.from_env()


@pytest.mark.parametrize(
    "wrong",
    [{"show": {"ir", "colours"}}, {"bucket_bytes": 0}, {"in_flight_bytes": -1}, {"deadline_s": float("nan")}],
)
def test_an_impossible_value_names_its_option(wrong: dict[str, Any]) -> None:
    named = "colours" if "show" in wrong else next(iter(wrong))
    with pytest.raises(DCompileError, match=named):
        Options.from_env(wrong)


def test_texts_and_lists_stand_for_sets_and_paths(tmp_path: Path) -> None:
    options = Options.from_env({"skip": "overlap", "eager_ops": ["exp", "exp"], "dump_dir": str(tmp_path)})
    assert options.skip == {"overlap"}
    assert options.eager_ops == {"exp"}
    assert options.dump_dir == tmp_path
    assert Options.from_env({"cache_dir": None}).cache_dir is None


def test_the_compiler_is_cxx_unless_named_for_dcompile_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++-12")
    assert Options.from_env().cxx == "g++-12"
    monkeypatch.setenv("DCOMPILE_CXX", "clang++")
    assert Options.from_env().cxx == "clang++"


def test_the_cache_folder_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/somewhere/.cache/dcompile")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/dcompile")
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", "/mine")
    assert default_cache_dir() == Path("/mine")


@pytest.mark.parametrize("name", READ)
def test_what_changes_programs_is_part_of_every_cache_key(name: str) -> None:
    changed = replace(Options(), **{name: READ[name][2]}).affects_code() != Options().affects_code()
    changing = {"eager_ops", "skip", "bucket_bytes", "in_flight_bytes", "peak_memory_bytes", "assert_layouts"}
    changing |= {"freeze", "autotune"}
    assert changed == (name in changing)


def test_an_allocator_tuned_by_the_user_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not allocator_is_tuned()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert allocator_is_tuned()


def test_the_rank_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert process_rank() == 3
    monkeypatch.delenv("RANK")
    assert process_rank() == 0
