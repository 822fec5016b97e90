"""Two ranks measure their link and go on with the same prices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


def _calibrate(rank: int, folder: str) -> tuple[str, str, float, int]:
    from dcompile.backend import backend
    from dcompile.options import Options
    from dcompile.pipeline import Built
    from dcompile.runtime import calibrate

    calibrate.SIZES = (*calibrate.SIZES[:2], calibrate.CONTENTION_BYTES["cpu"])
    first = calibrate.calibrate(None, Path(folder) / str(rank), 60.0)
    again = calibrate.calibrate(None, Path(folder) / str(rank), 60.0)
    group = dist.group.WORLD.group_name

    def step(x: Tensor, w: Tensor) -> Tensor:
        pending = torch.ops._c10d_functional.all_reduce(x * 2, "sum", group)
        return torch.ops._c10d_functional.wait_tensor(pending) + w @ w

    seen: list[Built] = []
    torch.compile(step, backend=backend(Options(), seen.append))(torch.randn(512, 512), torch.randn(512, 512))
    plan = seen[0].plan
    assert plan is not None
    assert plan.prediction is not None
    files = len(list((Path(folder) / str(rank) / "links").iterdir()))
    return first.to_json(), again.to_json(), plan.prediction.makespan_us, files


def test_all_ranks_have_the_same_prices_and_load_them_the_second_time(tmp_path: Path) -> None:
    found = run_ranks(_calibrate, str(tmp_path), deadline_s=200)
    assert found[0] == found[1]
    first, again, _, files = found[0]
    assert (first, files) == (again, 1)
