"""The fully sharded and the tensor parallel example: eager's losses, and checkpoints that move between backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.test_train_gpt import EXAMPLE, losses, train

pytestmark = [pytest.mark.multi_rank, pytest.mark.slow]


@pytest.mark.parametrize("name", ["train_fsdp.py", "train_tp.py"])
def test_dcompile_learns_what_eager_learns_and_goes_on_from_its_checkpoint(tmp_path: Path, name: str) -> None:
    example = EXAMPLE.with_name(name)
    common = ["--steps", "12", "--warmup", "2", "--checkpoint-dir", str(tmp_path / "saved"), "--checkpoint-every", "6"]
    train(*common, "--backend", "eager", "--loss-log", str(tmp_path / "eager"), ranks=2, example=example)
    expected = losses(tmp_path / "eager")
    assert expected[-1][1] < expected[0][1]
    (tmp_path / "saved" / "step-00000012" / ".metadata").unlink()
    text = train(*common, "--resume", "--loss-log", str(tmp_path / "ours"), ranks=2, example=example)
    assert "resumed at step 6" in text
    assert "compiled 2 graphs" in text
    for (step, loss), (number, reference) in zip(losses(tmp_path / "ours"), expected[6:], strict=True):
        assert step == number
        assert loss == pytest.approx(reference, rel=1e-4), f"step {step}"


def test_a_number_of_ranks_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="--tensor 3 does not divide the 2 ranks"):
        train("--tensor", "3", ranks=2, example=EXAMPLE.with_name("train_tp.py"))
