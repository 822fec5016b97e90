"""Settings of the whole test suite: one thread a process, a time limit for each test, reproducible random inputs."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the suite runs one test process a core

import hypothesis
import pytest
import torch

TEST_TIMEOUT_S = 300.0
"""Longest a test may take. The slowest tests start several processes, each of which imports torch and compiles
(together about a minute on two busy cores); more than this is a hang."""

SLOW_TEST_TIMEOUT_S = 900.0
"""The same for tests marked ``slow``."""

hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w")  # pytest's capture replaces the descriptor of sys.stderr


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the test process with the stacks of all its threads when a test hangs."""
    limit_s = SLOW_TEST_TIMEOUT_S if item.get_closest_marker("slow") else TEST_TIMEOUT_S
    faulthandler.dump_traceback_later(limit_s, exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
