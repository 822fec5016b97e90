"""Rows L7, L8 and T6: library calls of a program outside of it, and by which way the host program reaches them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import dcompile
from dcompile.codegen.calls import calls_json
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug, DCompileError, Unsupported
from dcompile.runtime.externs import FAST_CALLS, resolve_op
from dcompile.runtime.replay import replay
from tests.rows.check import chk


@torch.library.custom_op("dcompile_export::halves", mutates_args=())
def halves(x: Tensor, at: int, scale: float = 2.0) -> list[Tensor]:
    return [x[:at] * scale, x[at:] + 1]


@halves.register_fake
def _(x: Tensor, at: int, scale: float = 2.0) -> list[Tensor]:
    return [x.new_empty((at, *x.shape[1:])), x.new_empty((x.shape[0] - at, *x.shape[1:]))]


@torch.library.custom_op("dcompile_export::count", mutates_args=())
def count(x: Tensor) -> int:
    return 3


@count.register_fake
def _(x: Tensor) -> int:
    return 3


@torch.library.custom_op("dcompile_export::bump_", mutates_args=("x",))
def bump_(x: Tensor, by: float) -> None:
    x.add_(by)


def library_only(x: Tensor, w: Tensor) -> Any:
    a, b = torch.ops.dcompile_export.halves(x @ w, 2)
    values, order = torch.sort(b, dim=0, descending=True)
    return a, values, order


@pytest.mark.row("L7")
def test_exported_calls_reload_and_replay_with_equal_results() -> None:
    x, w = torch.randn(5, 4), torch.randn(4, 3)
    found = dcompile.explain(library_only, x, w).graphs[0]
    text = found.calls_json()
    calls = json.loads(text)
    assert found.plan is not None
    assert [call["op"] for call in calls] == ["aten.mm.default", "dcompile_export.halves.default", "aten.sort.default"]
    assert [call["returns"] for call in calls] == ["tensor", "list", "tuple"]
    names = [item.name for item in found.plan.graph.inputs]  # type: ignore[union-attr]
    given = dict(zip(names, (x, w), strict=True))
    made = replay(text, given)
    results = [made[out.name] for out in found.plan.graph.outputs]  # type: ignore[union-attr]
    for have, want in zip(results, library_only(x, w), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.row("L7")
def test_writes_numbers_and_literals_survive() -> None:
    graph = parse_graph("""
    graph g(x: f32[3]) {
      y: f64[3] = extern aten._to_copy.default(%x, dtype = <dtype "f64">)
      z: f64[3] = extern aten.clamp.default(%y, -inf, 0.5)
      extern dcompile_export.bump_.default(%z, 1.5) writes (z) versions (w: f64[3])
      return %w
    }
    """)
    x = torch.randn(3)
    made = replay(calls_json(graph), {"x": x})
    torch.testing.assert_close(made["w"], x.double().clamp(max=0.5) + 1.5)


@pytest.mark.row("L7")
def test_other_results_than_tensors_are_refused() -> None:
    graph = parse_graph("graph g(x: f32[3]) { _ = extern dcompile_export.count.default(%x) return %x }")
    with pytest.raises(Unsupported, match=r"dcompile_export\.count\.default, which returns int"):
        calls_json(graph)


@pytest.mark.row("L7")
def test_a_missing_tensor_is_named() -> None:
    graph = parse_graph("graph g(x: f32[3]) { y: f32[3] = extern aten.exp.default(%x) return %y }")
    with pytest.raises(DCompileError, match="takes x"):
        replay(calls_json(graph), {})


# Host programs are Python: an op is called directly where a faster way to it is known (``FAST_CALLS``), and through the
# dispatcher, by its name and schema, everywhere else. Ops that write or alias their arguments take the second way too:
# the dispatcher knows them by schema, so unlike a table of C functions nothing need be refused.


@pytest.mark.row("L8")
def test_ops_are_reached_directly_or_by_name() -> None:
    assert resolve_op("aten.mm.out") is torch.mm
    assert resolve_op("aten.sort.default") is torch.ops.aten.sort.default
    assert resolve_op("dcompile_export.halves.default") is torch.ops.dcompile_export.halves.default
    with pytest.raises(DCompileError, match="not registered here: import the library"):
        resolve_op("dcompile_export.nothing.default")
    with pytest.raises(CompilerBug, match="no runtime helper"):
        resolve_op("dcompile.nothing")


@pytest.mark.row("L8")
@pytest.mark.parametrize("name", sorted(FAST_CALLS))
def test_the_direct_way_gives_the_same(name: str) -> None:
    operands = {
        "aten.mm.out": (torch.randn(3, 4), torch.randn(4, 5)),
        "aten.addmm.out": (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)),
        "aten.bmm.out": (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
        "aten.baddbmm.out": (torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
    }[name]
    overload: Any = torch.ops
    for part in name.split("."):
        overload = getattr(overload, part)
    want = overload(*operands, out=torch.empty(0))
    have = FAST_CALLS[name](*operands, out=torch.empty_like(want))
    torch.testing.assert_close(have, want)


@pytest.mark.row("L8")
def test_a_host_program_calls_a_custom_op_and_one_that_writes() -> None:
    def function(x: Tensor) -> Any:
        y = x * 1.0
        torch.ops.dcompile_export.bump_(y, 2.0)
        return torch.ops.dcompile_export.halves(y, 1)

    seen = chk(function, torch.randn(3, 2))
    assert "rt.op('dcompile_export.halves.default')" in seen.host
    assert "rt.op('dcompile_export.bump_.default')" in seen.host


@pytest.mark.row("T6")
def test_collectives_are_called_by_what_they_are_not_by_an_op() -> None:
    """The host starts and waits for collectives through its communicator, which names kind, group and buffers; two
    ranks run such programs in ``tests/multi_gpu/test_compiled.py``."""
    from dcompile.codegen.collective import start_text
    from dcompile.collectives.nodes import Start

    graph = parse_graph("""
    graph g(x: f32[4]) {
      p: pending (y: f32[4]) = start all_reduce.sum (x) @dp[2]
      y: f32[4] = wait p
      return %y
    }
    """)
    (start,) = [node for node in graph.nodes if isinstance(node, Start)]
    text = start_text(start, "handle", lambda name: name, str)
    assert text.startswith("handle = start(")
    assert "'dp'" in text
