"""Rows D: mean and variance in one read, of parts, of nothing and of one value."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dcompile.ir import expr as ex
from dcompile.ir.combine import bound_to, rule
from dcompile.ir.kernel import Fold, Kernel, expressions, statements
from dcompile.ir.nodes import Reduction
from dcompile.ir.types import DType
from dcompile.reference import run_reference
from dcompile.reference.evaluate import Evaluator, Frame
from dcompile.schedule.fuse import fuse
from dcompile.schedule.split import Hint
from tests.rows.check import chk
from tests.rows.test_c_reductions import context, cut, graph_of, reductions

F64 = DType.F64


@pytest.mark.row("D1")
@pytest.mark.parametrize("dim", [-1, 0])
def test_one_kernel_and_one_read(dim: int) -> None:
    x = torch.randn(130, 300) + 1e4
    seen = chk(lambda x: torch.var_mean(x, dim), x, rtol=2e-5)
    assert (seen.K, seen.X) == (1, 0)
    (kernel,) = (node for node in seen.plan.graph.nodes if isinstance(node, Kernel))
    folds = [s for s in statements(kernel.body) if isinstance(s, Fold)]
    assert [[a.kind for a in fold.accumulators] for fold in folds] == [["welford"]]
    assert sum(len(ex.loads(root)) for root in expressions(kernel.body)) == 1
    variance, mean = seen.result
    wide = x.double()
    torch.testing.assert_close(variance.double(), wide.var(dim), rtol=5e-6, atol=0)
    torch.testing.assert_close(mean.double(), wide.mean(dim), rtol=1e-7, atol=0)


@pytest.mark.row("D1")
def test_normalisation_layers_read_their_statistics_once() -> None:
    f = torch.nn.functional
    x = torch.randn(6, 8, 5, 9) + 100

    def program(x: Tensor) -> list[Tensor]:
        return [f.layer_norm(x, (9,)), f.group_norm(x, 2), f.batch_norm(x, None, None, training=True), x.std((0, 2, 3))]

    seen = chk(program, x, rtol=1e-4, atol=2e-5)
    kinds = [
        a.kind
        for node in seen.plan.graph.nodes
        if isinstance(node, Kernel)
        for s in statements(node.body)
        if isinstance(s, Fold)
        for a in s.accumulators
    ]
    assert set(kinds) == {"welford"}
    assert seen.X == 0


@pytest.mark.row("D2")
def test_none_and_one() -> None:
    def program(none: Tensor, one: Tensor, rows: Tensor) -> list[Tensor]:
        found = [*torch.var_mean(none, 1), one.var(1), one.var(1, correction=0), *torch.var_mean(one, 1, correction=0)]
        return [*found, *torch.std_mean(rows, 1), rows.var(1, correction=9)]

    rows = torch.tensor([[1.0, 2.0, 4.0], [math.inf, 1.0, 2.0], [math.nan, 1.0, 2.0]])
    seen = chk(program, torch.empty(3, 0), torch.ones(3, 1), rows)
    assert seen.X == 0
    assert [bool(r.isnan().all()) for r in seen.result[:4]] == [True, True, True, False]
    assert seen.result[3].tolist() == [0.0] * 3


@pytest.mark.row("D2")
def test_a_count_that_is_not_known_may_be_zero() -> None:
    line = "m: f32[2], y: f32[2], n: f32[2] = reduce welford (i0: 2; r0: s0) x[i0, r0]"
    program = graph_of(line, "s0: size = 4, x: f32[2, s0]", out="n")
    (got,) = run_reference([fuse(program, context())], [[0, torch.empty(2, 0)]])[0]
    assert isinstance(got, Tensor)
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.row("D3")
@pytest.mark.parametrize("length", [8193, 65537, 10])
def test_parts_of_a_variance_with_a_ragged_end(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"m: f32[2]@cuda, y: f32[2]@cuda, n: f32[2]@cuda = reduce welford (i0: 2; r0: {length}) x[i0, r0]"
    inputs = f"x: f32[2, {length}]@cuda"
    counts = iter([7, 1] * 3)  # seven parts of two elements: two of them have none
    if length == 10:
        monkeypatch.setattr("dcompile.schedule.stages.choose_parts", lambda *_: (Hint.INNER, next(counts)))
    x = torch.randn(2, length) + 1e3
    for out, want in (("m", x.double().mean(1)), ("y", x.double().var(1, correction=0) * length), ("n", None)):
        after = cut(graph_of(line, inputs, out), 132)
        first, second = reductions(after)
        assert (first.kind, second.kind) == ("welford_merge", "welford_merge")
        for program in (after, fuse(after, context())):
            (got,) = run_reference([program], [[x]])[0]
            assert isinstance(got, Tensor)
            exact = torch.full((2,), float(length), dtype=torch.float64) if want is None else want
            torch.testing.assert_close(got.double(), exact, rtol=3e-5, atol=0)


def merge(parts: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The parts combined from left to right by the rule."""
    done = tuple(ex.const(v, F64) for v in parts[0])
    for part in parts[1:]:
        merged = bound_to(rule("welford_merge", F64), done, tuple(ex.const(v, F64) for v in part))
        values = [Evaluator(Frame({}, {})).full(e) for e in merged]
        done = tuple(ex.const(float(v), F64) for v in values)
    mean, squares, weight = (float(c.value) for c in done)  # type: ignore[attr-defined]
    return mean, squares, weight


def part_of(values: list[float]) -> tuple[float, float, float]:
    if not values:
        return 0.0, 0.0, 0.0
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(((x - x.mean()) ** 2).sum()), float(len(values))


@pytest.mark.row("D3", "D4")
def test_parts_without_weight() -> None:
    assert merge([(0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]) == (0.0, 0.0, 0.0)
    assert merge([(0.0, 0.0, 0.0), (3.0, 2.0, 5.0), (0.0, 0.0, 0.0)]) == (3.0, 2.0, 5.0)
    mean, squares, weight = merge([(math.inf, 0.0, 1.0), (math.inf, 0.0, 1.0)])
    assert (mean, weight) == (math.inf, 2.0)
    assert math.isnan(squares)  # as the variance of infinities is in eager
    assert merge([(math.inf, math.nan, 0.0), (1.0, 0.0, 1.0)]) == (1.0, 0.0, 1.0)


numbers = st.lists(st.floats(-100, 100), max_size=6)


@pytest.mark.row("D4")
@hypothesis.given(st.lists(numbers, min_size=1, max_size=6), st.sampled_from([0.0, 1e4, -1e6]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_partition_gives_the_same_variance(groups: list[list[float]], offset: float) -> None:
    groups = [[x + offset for x in group] for group in groups]
    mean, squares, weight = merge([part_of(group) for group in groups])
    whole = part_of([x for group in groups for x in group])
    scale = max((abs(x) for group in groups for x in group), default=0.0)
    assert weight == whole[2]
    assert mean == pytest.approx(whole[0], rel=1e-9, abs=1e-9)
    assert squares == pytest.approx(whole[1], rel=1e-6, abs=1e-9 * max(scale, 1.0))


@pytest.mark.row("D4")
def test_infinite_groups_leave_the_others_alone() -> None:
    x = torch.randn(4, 50)
    x[1, 3] = math.inf
    x[2, 7] = -math.inf
    seen = chk(lambda x: torch.var_mean(x, 1), x)
    variance, mean = seen.result
    assert [bool(v) for v in variance.isfinite()] == [True, False, False, True]
    assert [bool(v) for v in mean.isfinite()] == [True, False, False, True]
    columns = chk(lambda x: x.var(0), x.t().contiguous())
    assert [bool(v) for v in columns.result.isfinite()] == [True, False, False, True]


def test_moments_are_one_node() -> None:
    graph = graph_of("m: f32[2], y: f32[2], n: f32[2] = reduce welford (i0: 2; r0: 4) x[i0, r0]", "x: f32[2, 4]")
    (node,) = graph.nodes
    assert isinstance(node, Reduction)
    assert [value.name for value in node.defs] == ["m", "y", "n"]
