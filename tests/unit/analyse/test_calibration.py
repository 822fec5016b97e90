"""Measured prices: curves, text, and what they change in the cost model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcompile.analyse.calibration import Calibration, calibrated
from dcompile.analyse.cost import GLOO_LOOPBACK, CostModel
from dcompile.collectives.cost import Curve
from dcompile.collectives.nodes import Kind
from dcompile.ir.types import DType

FOUND = Calibration(2, {Kind.ALL_REDUCE: ((1000, 50.0), (2000, 80.0), (4000, 60.0))}, 0.3, 45_000.0, 10_000.0)


def test_times_are_linear_between_sizes_and_falling_neighbours_are_averaged() -> None:
    curve = FOUND.link(GLOO_LOOPBACK).curves[Kind.ALL_REDUCE]
    assert curve.points == ((1000, 50.0), (2000, 70.0), (4000, 70.0))
    assert [curve.at(size) for size in (1, 1500, 3000, 8000)] == [50.0, 60.0, 70.0, 70.0]


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=8), st.floats(0, 1e9), st.floats(0, 1e9))
def test_time_never_falls_with_the_size(times: list[float], a: float, b: float) -> None:
    curve = Curve.monotone([(1000 * (n + 1), us) for n, us in enumerate(times)])
    assert curve.at(min(a, b)) <= curve.at(max(a, b)) * (1 + 1e-9)


def test_text_gives_back_the_same_numbers() -> None:
    assert Calibration.from_json(FOUND.to_json()) == FOUND


def test_measured_prices_replace_documented_ones_of_their_group_and_kind_only() -> None:
    costs = CostModel.analytical("cpu", 2)
    measured = calibrated(costs, "cpu", {"g0": FOUND})
    assert measured.link("g0").transfer_us(Kind.ALL_REDUCE, 1500, 2) == 60.0
    for label, kind, ranks in (("g1", Kind.ALL_REDUCE, 2), ("g0", Kind.BROADCAST, 2), ("g0", Kind.ALL_REDUCE, 4)):
        known = costs.link(label).transfer_us(kind, 1500, ranks)
        assert measured.link(label).transfer_us(kind, 1500, ranks) == known
    assert measured.link("g0").contention == 0.3
    half = 45_000.0 / costs.roofline("cpu").matmul_flops_per_us[DType.F32]
    roof = measured.roofline("cpu")
    assert roof.matmul_flops_per_us[DType.BF16] == pytest.approx(
        half * costs.roofline("cpu").matmul_flops_per_us[DType.BF16]
    )
    assert roof.bytes_per_us == 10_000.0
    assert calibrated(costs, "cpu", {}) is costs
