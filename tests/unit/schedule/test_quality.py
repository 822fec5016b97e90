"""Buckets and order together against exhaustive search, and against the usual fixed sizes of buckets."""

from __future__ import annotations

import pytest

from dcompile.analyse.context import Context
from dcompile.collectives.text import parse_graph
from dcompile.options import Options
from dcompile.plan import Prediction
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.overlap import GAIN, overlap, predict
from tests.unit.schedule.oracle import Program, Reduce, Step, beaten, random_program, text_and_prices

PROGRAMS, AT_ONCE = 200, 20
CLOSE = 1.05
"""A schedule may be this much slower than the best one."""


def scheduled(program: Program, bucket_bytes: int | None = None) -> Prediction:
    text, prices = text_and_prices(program)
    ctx = Context(Options(bucket_bytes=bucket_bytes), prices)
    bucketed = bucket_collectives(parse_graph(text).check(), ctx)
    return predict(overlap(bucketed, ctx), ctx, bucketed)


@pytest.mark.parametrize("first", range(0, PROGRAMS, AT_ONCE))
def test_no_buckets_and_no_order_are_five_percent_faster(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        program = random_program(seed)
        found_us = scheduled(program).makespan_us
        better_us = beaten(program, found_us / CLOSE)
        assert better_us is None, f"program {seed}: {found_us} us, but there is a way that takes {better_us} us"


@pytest.mark.parametrize("first", range(0, PROGRAMS // 4, AT_ONCE))
def test_chosen_buckets_are_never_worse_than_the_usual_ones(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        program = random_program(seed)
        layer = max(sum(r.nbytes for r in program.reduces if r.source == n) for n in range(len(program.steps)))
        usual = [scheduled(program, limit).makespan_us for limit in (1, layer, 2**40)]
        assert scheduled(program).makespan_us <= min(usual) / (1 - GAIN), f"program {seed}: {usual}"


def test_the_oracle_knows_the_best_way_of_a_program_worked_out_by_hand() -> None:
    """Two nodes of 100 us, an all-reduce of 1 MiB behind each, 10 us and 50 us a MiB: apart the first is hidden and the
    program takes 200 + 60 us, in one bucket 200 + 110 us."""
    steps = (Step(100.0, (), ()), Step(100.0, (0,), ()))
    program = Program(steps, (Reduce(0, 0, 2**20), Reduce(1, 0, 2**20)), 10.0, 50.0 / 2**20, 0.0)
    assert beaten(program, 260.1) == pytest.approx(260.0)
    assert beaten(program, 259.9) is None
    assert scheduled(program).makespan_us == pytest.approx(260.0)


def test_the_oracle_slows_compute_beside_transfers() -> None:
    """The transfer of 60 us adds 30 % of itself to the node beside it: 100 + 18 us."""
    program = Program((Step(50.0, (), ()), Step(100.0, (0,), ())), (Reduce(0, 0, 2**20),), 10.0, 50.0 / 2**20, 0.3)
    assert beaten(program, 168.1) == pytest.approx(168.0)
    assert beaten(program, 167.9) is None
