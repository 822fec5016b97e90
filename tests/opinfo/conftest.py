"""The option ``--opinfo``: how much of the operator database a run checks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--opinfo", choices=("fast", "full"), default="fast", help="part of the operator database")
