from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.compiled import VANISHED, Facts, fetch_and_load, fingerprint, load_entry, write_entry
from dcompile.runtime.toolchain import Arity

SOURCE = 'extern "C" long k0(float* x, long n, long threads) { x[0] = n; return 0; }'
FACTS = Facts({"k0": Arity(1, 1)}, ("all_reduce.sum @g0[2] (f32[4])  # a.py:3",), 1, 2, 1, Counter({"aten.erfinv": 2}))


def build(folder: Path) -> None:
    write_entry(folder, "def call(inputs): return inputs", SOURCE, FACTS, None)


def test_facts_travel_as_json() -> None:
    assert Facts.from_json(FACTS.to_json()) == FACTS


def test_comments_do_not_change_the_fingerprint() -> None:
    assert fingerprint(("a  # x.py:1", "b")) == fingerprint(("a  # y.py:9", "b"))
    assert fingerprint(("a", "b")) != fingerprint(("b", "a"))


def test_an_entry_that_vanishes_before_it_is_loaded_is_built_again(tmp_path: Path) -> None:
    built: list[Path] = []

    class Vanishing(Cache):
        def fetch(self, key: str, build: object) -> Path:
            entry = super().fetch(key, build)  # type: ignore[arg-type]
            built.append(entry)
            if len(built) == 1:
                shutil.rmtree(entry)
            return entry

    loaded = fetch_and_load(Vanishing(tmp_path / "cache"), cache_key("program"), build)
    assert loaded.facts == FACTS
    assert len(built) == 2


def test_a_loaded_entry_does_not_need_its_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    loaded = fetch_and_load(cache, cache_key("program"), build)
    shutil.rmtree(tmp_path / "cache")
    assert loaded.functions["k0"].argtypes is not None
    with pytest.raises(VANISHED):
        load_entry(loaded.folder)
