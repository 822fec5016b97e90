"""Settings of the whole test suite: one thread a process, reproducible inputs. Time limits are in pyproject.toml."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the suite runs one test process a core

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("long", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--row", action="append", default=[], help="run the tests of this row only, A1 for example")
    parser.addoption(
        "--matrix", choices=("spread", "full"), default="spread", help="cells of tests/multi_gpu/test_matrix.py to run"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := set(config.getoption("--row")):
        items[:] = [item for item in items if any(wanted & set(mark.args) for mark in item.iter_markers("row"))]
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
