"""Rows R: from any line of a generated program back to the user's line, and what is told on the way."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dcompile
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.counters import TALLY, Tally
from dcompile.errors import Unsupported
from dcompile.ir.text import print_node
from dcompile.ir.types import Origin
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import chk

HERE = Path(__file__).name


@pytest.mark.row("R1")
def test_a_kernel_lists_the_ops_it_came_from() -> None:
    def program(x: Tensor) -> Tensor:
        return (x.sin() * 2 + 1).exp()

    seen = chk(program, torch.randn(9))
    (kernel,) = (step for step in seen.schedule if step.kind == "kernel")
    assert kernel.ops == ("aten.sin.default", "aten.mul.Tensor", "aten.add.Tensor", "aten.exp.default")
    assert kernel.node.origin.source.startswith(f"{HERE}:")
    comment = next(line for line in seen.code.splitlines() if line.startswith("// aten.sin"))
    for name in kernel.ops:
        assert name in comment
    assert Origin(("a", "b"), "") | Origin(("b", "c"), "t.py:1") == Origin(("a", "b", "c"), "t.py:1")
    assert Origin(("a",), "t.py:1") | Origin(("b",), "u.py:2") == Origin(("a", "b"), "t.py:1")


GOLDEN = """\
graph g(x: f32[4, 6]{1, 4}, i: i64[3]) {
  a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])  # aten.exp.default @train.py:3
  s: f32[4] = reduce sum (i0: 4; r0: 6) a[i0, r0]  # aten.sum.dim_IntList @train.py:4
  v: f32[6, 4]{1, 6} = view a (i0: 6, i1: 4) -> [i1, i0]  # aten.t.default
  s1: f32[4] = store add s (i0: 3) [q0 | q0 = i[i0]] = 1.0:f32
  m: f32[6, 6] = extern aten.mm.default(%v, %a) -> aten.mm.out  # aten.mm.default @train.py:5
  return %s1, %m
}
"""


@pytest.mark.row("R2")
def test_every_node_prints_and_parses() -> None:
    graph = parse_graph(GOLDEN)
    assert print_graph(graph) == GOLDEN
    assert print_node(graph.nodes[1]).endswith("# aten.sum.dim_IntList @train.py:4")


@pytest.mark.row("R3", "R4")
def test_every_step_leads_to_a_line_of_the_user() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        y = torch.mm(x, w)
        z = torch.ops.dcompile_rows.options(y)
        return z.exp() + 1

    seen = chk(program, torch.randn(4, 4), torch.randn(4, 4), rtol=1e-4, atol=1e-4)
    first = program.__code__.co_firstlineno
    for op, line in (("aten.mm", first + 1), ("dcompile_rows.options", first + 2), ("aten.exp", first + 3)):
        assert any(op in text and f"{HERE}:{line}" in text for text in seen.host.splitlines() if "#" in text), op


@pytest.mark.row("R3")
def test_backward_steps_lead_to_the_forward_line() -> None:
    layer = nn.Linear(4, 3)
    seen = chk(lambda x, w: (nn.functional.linear(x, w).tanh() ** 2).sum(), torch.randn(5, 4), layer.weight, grad=True)
    backward = seen.graphs[1].plan
    assert backward is not None
    for node in backward.graph.nodes:
        assert node.origin.source.startswith(f"{HERE}:"), node


@pytest.mark.row("R3")
def test_the_whole_stack_is_kept_on_request() -> None:
    def inner(x: Tensor) -> Tensor:
        return x.sin()

    def program(x: Tensor) -> Tensor:
        return inner(x) * 2

    seen = chk(program, torch.randn(3), tracebacks=True)
    (kernel,) = (step for step in seen.schedule if step.kind == "kernel")
    assert "in inner" in kernel.node.origin.stack
    assert "in program" in kernel.node.origin.stack
    assert HERE in kernel.node.origin.stack
    plain = chk(program, torch.randn(3))
    assert all(step.node.origin.stack == "" for step in plain.schedule)
    error = Unsupported(kernel.node.origin, "this", "that")
    assert "in inner" in str(error)
    assert "\n" not in str(Unsupported(Origin((), "t.py:1"), "this", "that"))


@pytest.mark.row("R5")
def test_each_fallback_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    custom = torch.ops.dcompile_rows.options
    TALLY._told.discard("dcompile_rows.options.default")
    dcompile.reset_counters()
    with caplog.at_level(logging.INFO, "dcompile"):
        chk(lambda x: custom(custom(custom(x))), torch.randn(4))
        chk(lambda x: custom(x) + 1, torch.randn(5))
    told = [record for record in caplog.records if "dcompile_rows.options.default" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.INFO]  # the user's own op: nothing could be done better
    assert dcompile.counters().fallbacks["dcompile_rows.options.default"] == 4
    caplog.clear()
    tally = Tally()
    for _ in range(3):
        tally.add_fallbacks(Counter({"aten.never_heard_of.default": 2}))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.row("R5")
def test_decisions_carry_their_reasons() -> None:
    told = dcompile.explain(lambda x, w: (torch.mm(x, w).exp(), (x + 1).sum()), torch.randn(8, 8), torch.randn(8, 8))
    lines = told.graphs[0].decisions.splitlines()
    assert lines
    assert all(line.endswith(")") and "(" in line for line in lines)
