"""The CPU benchmark runs from end to end, and its summary says what its measurements say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ddp_cpu import LOSS_TOLERANCE, main, parse, summarise


def measured(step_ms: float, compile_s: float, losses: list[float]) -> dict[str, object]:
    return {"step_ms": step_ms, "compile_s": compile_s, "first_step_s": compile_s + step_ms / 1e3, "losses": losses}


def test_summary_takes_medians_and_compares_losses() -> None:
    eager = {"cold": [measured(10.0, 0.1, [2.0, 1.0])], "warm": [measured(12.0, 0.3, [2.0, 1.0])]}
    other = {
        "cold": [measured(5.0, 9.0, [2.0, 1.0]), measured(7.0, 11.0, [2.0, 1.5]), measured(6.0, 30.0, [2.0, 1.0])],
        "warm": [measured(1.0, 2.0, [2.0, 1.0]), measured(9.0, 4.0, [2.0, 1.0]), measured(8.0, 3.0, [2.0, 1.0])],
    }
    first, second = summarise({"eager": eager, "dcompile": other})
    assert (first["step_ms"], first["loss_difference"], first["losses_equal"]) == (11.0, 0.0, True)
    assert (second["step_ms"], second["cold_compile_s"], second["warm_compile_s"]) == (6.5, 11.0, 3.0)
    assert second["loss_difference"] == pytest.approx(0.5)
    assert not second["losses_equal"]


def test_losses_within_the_tolerance_are_equal() -> None:
    eager = {"cold": [measured(1.0, 1.0, [4.0])], "warm": [measured(1.0, 1.0, [4.0])]}
    near = {"cold": [measured(1.0, 1.0, [4.0 * (1 + LOSS_TOLERANCE / 2)])], "warm": [measured(1.0, 1.0, [4.0])]}
    far = {"cold": [measured(1.0, 1.0, [4.0 * (1 + LOSS_TOLERANCE * 2)])], "warm": [measured(1.0, 1.0, [4.0])]}
    rows = summarise({"eager": eager, "near": near, "far": far})
    assert [row["losses_equal"] for row in rows] == [True, True, False]


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--steps", "3"])
    assert "--steps must be at least 4" in capsys.readouterr().err


@pytest.mark.multi_rank
def test_one_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backends", "eager", "--preset", "tiny", "--steps", "6", "--repetitions", "1"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-ddp_cpu.json")
    record = json.loads(file.read_text())
    assert record["command"].startswith("python benchmarks/ddp_cpu.py --backends eager")
    assert record["hardware"]["cores"] >= 1
    assert record["shape"] == {"layers": 2, "width": 64, "heads": 2, "context": 64}
    (row,) = record["summary"]
    assert row["backend"] == "eager"
    assert row["losses_equal"] is True
    assert row["step_ms"] > 0
    for state in ("cold", "warm"):
        (run,) = record["measurements"]["eager"][state]
        assert len(run["losses"]) == 6
        assert run["first_step_s"] > 0
    assert "eager" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multi_rank
def test_dcompile_is_compared_with_eager(tmp_path: Path) -> None:
    arguments = ["--backends", "eager", "dcompile", "--preset", "tiny", "--steps", "6", "--repetitions", "1"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0, "the losses agree"
    (file,) = tmp_path.glob("*-ddp_cpu.json")
    eager, compiled = json.loads(file.read_text())["summary"]
    assert (eager["backend"], compiled["backend"]) == ("eager", "dcompile")
    assert compiled["losses_equal"] is True
    assert compiled["loss_difference"] <= LOSS_TOLERANCE
    assert min(compiled["cold_compile_s"], compiled["warm_compile_s"]) > 0
