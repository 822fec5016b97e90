"""The table of collectives."""

from __future__ import annotations

import pytest
import sympy

from dcompile.collectives.nodes import Kind, Start
from dcompile.collectives.rules import RULES, check, is_contiguous, payload_bytes, result_shape, result_value
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug, Unsupported
from dcompile.ir.graph import Graph
from dcompile.ir.index import FloorDiv, symbol
from dcompile.ir.types import DType, Value

S0 = symbol("s0")


def launch(line: str, inputs: str = "x: f32[4, 6]") -> tuple[Start, Graph]:
    graph = parse_graph(f"graph g({inputs}) {{\n  {line}  # c10d.op @train.py:7\n  return %x\n}}\n")
    node = graph.nodes[0]
    assert isinstance(node, Start)
    return node, graph


@pytest.mark.parametrize(
    ("kind", "shape", "size", "expected"),
    [
        (Kind.ALL_REDUCE, (4, 6), 3, (4, 6)),
        (Kind.ALL_REDUCE, (), 3, ()),
        (Kind.BROADCAST, (5,), 2, (5,)),
        (Kind.ALL_GATHER, (4, 6), 3, (12, 6)),
        (Kind.ALL_GATHER, (), 3, (3,)),
        (Kind.ALL_GATHER, (0, 6), 3, (0, 6)),
        (Kind.ALL_GATHER, (S0, 6), 2, (2 * S0, 6)),
        (Kind.REDUCE_SCATTER, (4, 6), 2, (2, 6)),
        (Kind.REDUCE_SCATTER, (4 * S0, 6), 2, (2 * S0, 6)),
        (Kind.REDUCE_SCATTER, (S0,), 2, (FloorDiv(S0, sympy.Integer(2)),)),
        (Kind.ALL_TO_ALL, (4, 6), 2, (4, 6)),
    ],
)
def test_result_shapes(kind: Kind, shape: tuple[int, ...], size: int, expected: tuple[int, ...]) -> None:
    assert result_shape(kind, shape, size) == expected


@pytest.mark.parametrize("kind", [Kind.REDUCE_SCATTER, Kind.ALL_TO_ALL])
@pytest.mark.parametrize("shape", [(5, 2), (), (2 * S0 + 1, 4)])
def test_rows_that_the_group_does_not_divide(kind: Kind, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="over 2 ranks"):
        result_shape(kind, shape, 2)


def test_results_are_contiguous_and_keep_dtype_and_device() -> None:
    source = Value("x", DType.BF16, (2, 3), (3, 1), "cuda")
    assert result_value(Kind.ALL_GATHER, "r", source, 4) == Value("r", DType.BF16, (8, 3), (3, 1), "cuda")


GOOD = [
    "p: pending (r: f32[4, 6]) = start all_reduce.avg (x) @g0[2]",
    "p: pending in place (r: f32[4, 6]) = start all_reduce.sum (x) @g0[2]",
    "p: pending (r: f32[8, 6]) = start all_gather (x) @g0[2]",
    "p: pending (r: f32[2, 6]) = start reduce_scatter.sum (x) @g0[2]",
    "p: pending in place (r: f32[4, 6]) = start broadcast (x) @g0[2] root 1",
    "p: pending (r: f32[4, 6]) = start all_to_all (x) @g0[2]",
    "p: pending (r: f32[8, 6], s: f32[8, 6]) = start all_gather (x, x) @g0[2]",
]


@pytest.mark.parametrize("line", GOOD)
def test_launches_that_follow_the_table(line: str) -> None:
    check(*launch(line))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p: pending (r: f32[4, 6]) = start all_reduce (x) @g0[2]", "reduction None"),
        ("p: pending (r: f32[8, 6]) = start all_gather.sum (x) @g0[2]", "reduction sum"),
        ("p: pending in place (r: f32[8, 6]) = start all_gather (x) @g0[2]", "in place"),
        ("p: pending (r: f32[4, 6]) = start all_gather (x) @g0[2]", "the rule gives"),
        ("p: pending (r: f64[4, 6]) = start all_reduce.sum (x) @g0[2]", "the rule gives"),
        ("p: pending (r: f32[4, 6]) = start broadcast (x) @g0[2]", "root None"),
        ("p: pending (r: f32[4, 6]) = start broadcast (x) @g0[2] root 2", "from rank 2 of a group of 2"),
        ("p: pending (r: f32[4, 6]) = start all_reduce.sum (x) @g0[2] root 0", "root 0"),
        ("p: pending (r: f32[8, 6]) = start all_gather (x, x) @g0[2]", "2 sources but 1 results"),
        ("p: pending in place (r: f32[4, 6], s: f32[4, 6]) = start all_reduce.sum (x, x) @g0[2]", "twice"),
    ],
)
def test_malformed_launches_are_bugs(line: str, words: str) -> None:
    with pytest.raises(CompilerBug, match=words):
        check(*launch(line))


def test_sources_must_be_contiguous() -> None:
    start, graph = launch(GOOD[0], "x: f32[4, 6]{1, 4}")
    with pytest.raises(CompilerBug, match="not contiguous"):
        check(start, graph)


def test_what_the_user_can_change_names_line_and_way_out() -> None:
    line = "p: pending (r: f32[2, 6]) = start reduce_scatter.sum (x) @g0[2]"
    with pytest.raises(Unsupported, match=r"train.py:7: reduce_scatter over 2 ranks of 5 rows .* pad dimension 0"):
        check(*launch(line, "x: f32[5, 6]"))
    with pytest.raises(Unsupported, match=r"train.py:7: all_reduce with reduction bor of f32 values"):
        check(*launch(GOOD[0].replace(".avg", ".bor")))
    integers = "p: pending (r: i64[4, 6]) = start all_reduce.bor (x) @g0[2]"
    check(*launch(integers, "x: i64[4, 6]"))


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [(GOOD[0], 96), (GOOD[1], 96), (GOOD[2], 192), (GOOD[3], 96), (GOOD[4], 96), (GOOD[5], 96), (GOOD[6], 384)],
)
def test_payload_is_the_larger_side(line: str, nbytes: int) -> None:
    assert payload_bytes(*launch(line)) == nbytes


def test_payload_of_symbolic_sizes_uses_the_hint() -> None:
    line = "p: pending (r: f32[2*s0, 6]) = start all_gather (x) @g0[2]"
    assert payload_bytes(*launch(line, "x: f32[s0, 6], s0: size = 5")) == 2 * 5 * 6 * 4


def test_contiguity_ignores_strides_of_single_elements() -> None:
    assert is_contiguous(Value("x", DType.F32, (4, 1, 6), (6, 99, 1)))
    assert is_contiguous(Value("x", DType.F32, (0, 6), (1, 1)))
    assert not is_contiguous(Value("x", DType.F32, (4, 6), (12, 1)))
    assert is_contiguous(Value("x", DType.F32, (3, S0), (S0, 1)))


def test_every_kind_has_a_row() -> None:
    assert set(RULES) == set(Kind)
