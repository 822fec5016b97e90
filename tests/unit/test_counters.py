from __future__ import annotations

import time
from collections import Counter

import pytest

from dcompile.counters import Tally


def test_amounts_and_fallbacks_add_up_until_reset() -> None:
    tally = Tally()
    tally.add(graphs=1, kernels=3)
    tally.add(graphs=1)
    tally.add_fallbacks(Counter({"aten.erfinv.default": 2}))
    now = tally.snapshot()
    assert (now.graphs, now.kernels, now.fallbacks["aten.erfinv.default"]) == (2, 3, 2)
    tally.reset()
    assert tally.snapshot().graphs == 0
    assert now.graphs == 2, "a snapshot stays as it was"


def test_an_inner_stage_counts_only_for_itself() -> None:
    tally = Tally()
    with tally.timed("outer"):
        time.sleep(0.02)
        with tally.timed("inner"):
            assert tally.snapshot().stage == "inner"
            time.sleep(0.1)
        assert tally.snapshot().stage == "outer"
    seconds = tally.snapshot().seconds
    assert tally.snapshot().stage == ""
    assert seconds["inner"] >= 0.1
    assert 0.02 <= seconds["outer"] < 0.1


def test_a_stage_that_raises_is_closed() -> None:
    tally = Tally()
    with pytest.raises(ValueError, match="broken"), tally.timed("fuse"):
        raise ValueError("broken")
    assert tally.snapshot().stage == ""
    assert tally.snapshot().seconds["fuse"] > 0
