"""The model benchmark runs from end to end, and its summary says what its measurements say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.models_cpu import differing, main, summarise, totals


def measured(step_s: float, cold_s: float = 0.0, warm_s: float = 0.0) -> dict[str, object]:
    first = {"rss_mib": 100.0 + cold_s}
    return {
        "turns_s": [step_s, step_s, 9.0],
        "cold": {"first_step_s": cold_s, **first},
        "warm": {"first_step_s": warm_s, **first},
    }


def test_speeds_are_geometric_means_and_compile_seconds_sums() -> None:
    rows = summarise(
        {
            "a": {"eager": measured(1.0), "dcompile": measured(0.5, 3.5, 1.5)},
            "b": {"eager": measured(1.0), "dcompile": measured(2.0, 5.0, 4.0)},
        }
    )
    found = totals(rows)
    assert found["eager"]["speed"] == 1.0
    assert found["dcompile"]["speed"] == pytest.approx(1.0)
    assert (found["dcompile"]["cold_s"], found["dcompile"]["warm_s"]) == (6.0, 3.0)
    assert found["dcompile"]["rss_mib"] == 105.0


@pytest.mark.parametrize("wrong", [{"loss": 0.1}, {"gradient": 0.1}, {"loss": float("nan")}])
def test_a_difference_is_named(wrong: dict[str, float]) -> None:
    right = {"model": "a", "loss": 1e-7, "gradient": 1e-6}
    assert differing([right, {**right, "model": "b", **wrong}, {"model": "c"}]) == ["b"]


def test_the_benchmark_measures_eager_and_dcompile(tmp_path: Path) -> None:
    flags = ["--models", "dlrm", "--backends", "eager", "dcompile", "--scale", "test", "--threads", "1"]
    assert main([*flags, "--repetitions", "1", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    ours = record["summary"][1]
    assert ours["backend"] == "dcompile"
    assert ours["kernels"] > 0
    assert ours["step_ms"] > 0
    assert ours["cold_s"] > ours["warm_s"]
    assert record["measurements"]["dlrm"]["dcompile"]["cold"]["program"]["graph_breaks"] == 0
