"""Scripts of other libraries gain by one line, and their losses stay: two CPU ranks under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {"hf_trainer": "transformers", "fabric": "lightning_fabric", "accelerate_loop": "accelerate"}


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("name", NEEDS)
def test_one_line_compiles_the_script_and_keeps_its_losses(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[name])
    result = tmp_path / "result.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", str(ROOT / "tests/examples/twice.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples/third_party" / f"{name}.py")
    done = subprocess.run(
        [*start, script, str(result)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(result.read_text())
    assert found["world"] == 2
    assert len(found["eager"]) == 6
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-3)
    assert found["eager"][-1] < found["eager"][0]
    assert found["graphs"] >= 2, f"a forward and a backward graph at least: {found}"
    assert found["kernels"] >= 2
    assert not [op for op in found["fallbacks"] if "op by op" in op]
