"""The example trains, alone and on two ranks, and a resumed run repeats the rest of the first one bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.train_gpt import GPT, PRESETS, batch_of, learning_rate, parse, standard_library

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_gpt.py"


def train(*arguments: str, ranks: int = 0, mpi: bool = False, example: Path = EXAMPLE) -> str:
    started = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if mpi else []
    launcher = ["-m", "dcompile_launch", *(() if mpi else ("--nproc", str(ranks)))] if ranks else []
    command = [*started, sys.executable, *launcher, str(example), "--preset", "tiny", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(path: Path) -> list[tuple[int, float]]:
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def test_one_process_learns(tmp_path: Path) -> None:
    log = tmp_path / "loss"
    text = train("--backend", "eager", "--steps", "40", "--warmup", "5", "--lr", "3e-3", "--loss-log", str(log))
    found = losses(log)
    assert [step for step, _ in found] == list(range(1, 41))
    assert 5.3 < found[0][1] < 5.8, "an untrained model over 256 bytes has a loss near ln 256"
    assert found[-1][1] < 4.0
    assert "1 rank on cpu" in text
    assert "communication hidden: not measured" in text


def compare(tmp_path: Path, steps: int, saved: int, resumed: tuple[str, ...]) -> None:
    """Train ``steps`` steps on two ranks, eager and with dcompile; the losses agree at every one of them.

    The backends ``resumed`` train again from their checkpoint at ``saved``, as if the first run had been stopped while
    saving the last one: these losses must be the same bits.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for backend in ("eager", "dcompile"):
        checkpoints = tmp_path / f"{backend}-checkpoints"
        common = ["--backend", backend, "--steps", str(steps), "--warmup", str(steps // 10)]
        common += ["--checkpoint-dir", str(checkpoints), "--checkpoint-every", str(saved), "--loss-log"]
        train(*common, str(tmp_path / backend), ranks=2)
        found[backend] = losses(tmp_path / backend)
        assert [step for step, _ in found[backend]] == list(range(1, steps + 1))
        if backend in resumed:
            (checkpoints / f"step-{steps:08}" / ".metadata").unlink()
            again = train(*common, str(tmp_path / f"{backend}-resumed"), "--resume", ranks=2)
            assert f"resumed at step {saved}" in again
            assert losses(tmp_path / f"{backend}-resumed") == found[backend][saved:]
    for (step, loss), (_, expected) in zip(found["dcompile"], found["eager"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), f"step {step}"


@pytest.mark.multi_rank
def test_dcompile_learns_what_eager_learns_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    compare(tmp_path, steps=12, saved=6, resumed=("dcompile",))
    log = tmp_path / "mpi"
    train("--backend", "dcompile", "--steps", "12", "--warmup", "1", "--loss-log", str(log), ranks=2, mpi=True)
    assert losses(log) == losses(tmp_path / "dcompile"), "mpirun or dcompile-launch, the losses are the same bits"


@pytest.mark.slow
@pytest.mark.multi_rank
def test_200_steps_follow_eager_at_every_step_and_resume_at_100(tmp_path: Path) -> None:
    compare(tmp_path, steps=200, saved=100, resumed=("eager", "dcompile"))


def test_batches_depend_on_seed_rank_and_step_only() -> None:
    text = torch.randint(256, (5000,), dtype=torch.uint8)
    chosen = {"seed": 3, "rank": 1, "step": 7}
    tokens, targets = batch_of(text, 4, 16, **chosen)
    assert tokens.shape == targets.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, batch_of(text, 4, 16, **chosen)[0])
    for name in chosen:
        assert not torch.equal(tokens, batch_of(text, 4, 16, **{**chosen, name: chosen[name] + 1})[0])


def test_the_text_is_the_standard_library() -> None:
    text = standard_library()
    assert len(text) > 5_000_000
    assert Path(json.__file__).read_bytes() in text.numpy().tobytes()


def test_the_small_preset_has_about_ten_million_parameters() -> None:
    assert 10.5e6 < sum(p.numel() for p in GPT(PRESETS["small"]).parameters()) < 11.5e6


def test_position_t_does_not_see_later_tokens() -> None:
    model = GPT(PRESETS["tiny"])
    tokens = torch.randint(256, (1, 12))
    targets = torch.full((1, 12), -100)  # cross_entropy ignores -100
    targets[0, 5] = 17
    changed = tokens.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 256
    assert torch.equal(model(tokens, targets), model(changed, targets))
    changed[0, 5] = (changed[0, 5] + 1) % 256
    assert not torch.equal(model(tokens, targets), model(changed, targets))


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    given = parse(["--steps", "200", "--warmup", "20", "--lr", "0.5"])
    rates = [learning_rate(step, given) for step in range(201)]
    assert rates[0] == 0.5 / 20
    assert max(rates) == rates[19] == rates[20] == 0.5
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[200] == pytest.approx(0.05)
