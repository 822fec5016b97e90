"""Training goes on after an accident from the last checkpoint, and ends with the losses of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 4

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]


def command(accident: str, folder: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Two ranks with dropout, whose random state matters, eager: accidents do not ask who compiled."""
    arguments = ["--preset", "tiny", "--backend", "eager", "--dropout", "0.1", "--steps", str(STEPS), "--warmup", "2"]
    arguments += ["--checkpoint-dir", str(folder / "saved"), "--checkpoint-every", str(EVERY), "--resume"]
    arguments += ["--loss-log", str(folder / "loss")]
    start = [sys.executable, "-m", "dcompile_launch", "--nproc", "2", *launcher]
    return [*start, str(ROOT / "tests/examples/sabotage.py"), accident, *arguments, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}


def run(*args: str, code: int = 0) -> str:
    done = subprocess.run(args, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "loss").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(*command("none", folder))
    found = losses(folder)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


@pytest.mark.parametrize("how", ["while all wait", "in the background"])
def test_a_rank_killed_in_a_checkpoint_restarts_from_the_one_before(
    tmp_path: Path, undisturbed: list[tuple[int, float]], how: str
) -> None:
    background = ("--checkpoint-async",) if how == "in the background" else ()
    text = run(*command("kill", tmp_path, *background, launcher=("--max-restarts", "1")))
    assert f"resumed at step {EVERY}" in text
    assert losses(tmp_path) == undisturbed
    saved = sorted(path.parent.name for path in (tmp_path / "saved").glob("*/.metadata"))
    assert saved == [f"step-{step:08}" for step in range(EVERY, STEPS + 1, EVERY)]


def test_a_full_disk_is_named_and_costs_no_older_checkpoint(tmp_path: Path) -> None:
    run(*command("none", tmp_path, "--steps", "2"))
    text = run(*command("full", tmp_path), code=1)
    assert "resumed at step 2" in text
    assert re.search(r"SaveFailed: cannot save a checkpoint in .* MB free there; the last complete one is", text)
    assert text.rstrip().endswith("the last complete one is step-00000002")
    assert [path.parent.name for path in (tmp_path / "saved").glob("*/.metadata")] == ["step-00000002"]


def test_sigterm_saves_before_it_leaves(tmp_path: Path, undisturbed: list[tuple[int, float]]) -> None:
    job = subprocess.Popen(
        command("slow", tmp_path, "--checkpoint-every", "0"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    while not ((tmp_path / "loss").exists() and len(losses(tmp_path)) >= 2) and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    text, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM, text
    (stopped,) = map(int, re.findall(r"asked to stop after step (\d+), which is saved", text))
    assert 2 <= stopped < STEPS
    assert losses(tmp_path) == undisturbed[:stopped]
    text = run(*command("none", tmp_path))
    assert f"resumed at step {stopped}" in text
    assert losses(tmp_path) == undisturbed
