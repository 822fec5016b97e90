"""PyTorch's operator database, compiled and compared with eager PyTorch.

The whole of it, about twenty minutes on two cores, sharded by operator::

    python -m pytest tests/opinfo --opinfo=full -n auto

Without the option a fixed part runs: a share of the operators with one sample each, all calls that eager rejects, and
some operators through ``torch.compile`` from end to end. ``python -m tests.opinfo.sweep --table docs/operators.md``
writes the table of generated kernels and library calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dcompile
from tests.opinfo.check import Report, check_operator, check_rejections, differs, draws, run
from tests.opinfo.known import (
    END_TO_END,
    FAILING,
    UNINITIALISED,
    UNTRACEABLE,
    UNTRACEABLE_IN_PLACE,
    UNTRACEABLE_SYMBOLIC,
)
from tests.opinfo.operators import OPERATORS, eligible, samples
from tests.opinfo.sweep import beside_inductor, read_table

TABLE = Path(__file__).parents[2] / "docs" / "operators.md"
FAST_SHARE = 5
"""The fast part takes one operator of so many."""
FULL_SAMPLES = 6
"""Samples of each operator that the whole compiles in float32; of other dtypes and variants it takes the first."""
BROAD = ("bfloat16", "int64", "bool")
"""dtypes tested besides float32, by the operators that take them."""
LIBRARY_ONLY_LIMIT = 0.075
"""Largest share of operators without a generated kernel."""
LEAST_MEASURED = 0.5
"""Share of the operators that Inductor must have been measured with for the comparison to mean something."""


@dataclass(frozen=True)
class Case:
    """One test of one operator. ``variant`` is "", "in_place" or "dynamic"."""

    name: str
    dtype: str
    variant: str
    count: int

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.name, self.dtype, self.variant) if part)


def cases(full: bool) -> Iterator[Case]:
    for dtype in ("float32", *BROAD):
        for name in eligible(getattr(torch, dtype)):
            kinds = ["", "in_place"] if OPERATORS[name].get_inplace() is not None else [""]
            for variant in [*kinds, "dynamic"] if dtype == "float32" else kinds:
                plain = (dtype, variant) == ("float32", "")
                case = Case(name, dtype, variant, FULL_SAMPLES if full and plain else 1)
                share = FAST_SHARE if plain else 8 * FAST_SHARE
                if full or zlib.crc32(case.id.encode()) % share == 0:
                    yield case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("opinfo", default="fast") == "full"
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(cases(full)), ids=lambda case: case.id)
    if "rejecting" in metafunc.fixturenames:
        names = [name for name in eligible(torch.float32) if OPERATORS[name].error_inputs_func is not None]
        metafunc.parametrize("rejecting", names)


def test_operator(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if case.id in FAILING:
        request.applymarker(pytest.mark.xfail(reason=FAILING[case.id]))
    report = check_operator(case.name, getattr(torch, case.dtype), case.count, tmp_path, case.variant)
    assert not report.failures, "\n".join(report.failures)
    if report.only_library and case.dtype == "float32" and not case.variant:
        assert read_table(TABLE)[case.name].only_library, f"{case.name} had kernels and only calls the library now"
    _check_untraceable(case, report)


def _check_untraceable(case: Case, report: Report) -> None:
    """What AOTAutograd itself cannot trace is known by name, and no operator is in that list without need."""
    if report.untraceable:
        known = UNTRACEABLE | {"dynamic": UNTRACEABLE_SYMBOLIC, "in_place": UNTRACEABLE_IN_PLACE}.get(case.variant, {})
        assert case.name in known, f"not traceable: {report.untraceable}"
    elif case.dtype == "float32" and not case.variant and case.count == FULL_SAMPLES:
        assert case.name not in UNTRACEABLE, f"{case.name} is traceable now"


def test_what_eager_rejects_is_rejected(rejecting: str, tmp_path: Path) -> None:
    wrong = check_rejections(rejecting, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [*END_TO_END, *sorted(UNTRACEABLE)[::6]])
def test_from_end_to_end(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    grad = OPERATORS[name].supports_autograd
    (sample,) = samples(name, torch.float32, 1, grad)
    want = run(sample.function, sample.fresh(grad))
    compiled = dcompile.compile(sample.function, dynamic=False, cache_dir=tmp_path)
    random = name in UNINITIALISED or draws(sample, grad)
    assert differs(want, run(compiled, sample.fresh(grad)), values=not random) == ""


def test_the_share_of_operators_that_only_call_the_library_does_not_grow() -> None:
    """The table lists every operator, none that fails without being known, and few without a kernel: no more than
    Inductor has."""
    rows = read_table(TABLE)
    assert set(rows) == set(eligible(torch.float32))
    assert sum(row.only_library for row in rows.values()) <= LIBRARY_ONLY_LIMIT * len(rows)
    seen = beside_inductor(rows.values())
    assert seen.measured >= LEAST_MEASURED * len(rows)
    assert seen.ours <= seen.theirs
    failing = {name for name, row in rows.items() if row.failures}
    assert failing <= {case.removesuffix("-float32") for case in FAILING}
