"""Rows K and L: library calls, on purpose and for want of a rule."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dcompile
from dcompile.analyse.dependence import predecessors
from dcompile.codegen.cpp import CppModule
from dcompile.codegen.wrapper import print_host
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import CompilerBug, DCompileError
from dcompile.ir.kernel import Kernel, Nest
from dcompile.plan import Home
from dcompile.schedule.memory import plan_memory
from dcompile.watch import describe_memory
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import chk
from tests.unit.schedule.passes import context

custom = torch.ops.dcompile_rows


@pytest.mark.row("L1", "L10")
def test_results_of_every_kind() -> None:
    def program(x: Tensor) -> tuple[object, ...]:
        first, count, nothing, others, half = custom.mixed(x)
        low, high = custom.halves(x * 2)
        return first * count, nothing, others[1] + half, low + high, custom.half_count(x) * x

    seen = chk(program, torch.randn(5))
    assert sorted(set(seen.externs)) == [f"dcompile_rows.{n}.default" for n in ("half_count", "halves", "mixed")]
    everything = chk(lambda x: custom.mixed(x), torch.randn(4, 3))
    assert everything.result[1] == 12
    text = print_graph(everything.plan.graph)
    assert "promises (1: 12, 5: 6.0)" in text
    assert print_graph(parse_graph(text)) == text


@pytest.mark.row("L1")
def test_a_number_that_is_not_what_was_promised_is_an_error() -> None:
    torch.compiler.reset()
    compiled = dcompile.compile(lambda x: x * custom.total(x), cache_dir=None)
    with pytest.raises(DCompileError, match=r"dcompile_rows.total.default at test_library.py:\d+ returned .*Instead"):
        compiled(torch.ones(4))


@pytest.mark.row("L10")
def test_a_size_that_two_results_have_is_defined_once() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return values * 2, inverse, counts + 1, torch.zeros(values.shape[0]) + counts

    def own(x: Tensor) -> Tensor:
        found, count = custom.positive(x)
        return found * 2 + torch.arange(count)

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        seen = chk(program, torch.randint(0, 5, (20,)), also=[(torch.randint(0, 9, (20,)),)])
        assert len(seen.graphs) == 1
        assert len([d for node in seen.plan.graph.nodes for d in node.defs if type(d).__name__ == "Number"]) == 1
        assert len(chk(own, torch.randn(20), also=[(torch.randn(20),)]).graphs) == 1


@pytest.mark.row("K1")
def test_a_library_call_depends_on_the_whole_of_every_operand() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        return torch.linalg.multi_dot([torch.mm(x + 1, w), w * 2, x.exp()])

    seen = chk(program, torch.randn(4, 4), torch.randn(4, 4), rtol=1e-4, atol=1e-4)
    graph = seen.plan.graph
    for position, node in enumerate(graph.nodes):
        for name in node.operands:
            assert graph.producer.get(name, -1) < position
    text = """graph g(x: f32[4, 4], y: f32[4, 4]) {
      a: f32[4, 4] = pointwise (i0: 4, i1: 4) x[i0, i1] + 1.0:f32
      b: f32[4, 4] = view a (i0: 4, i1: 4) -> [i1, i0]
      c: f32[4, 8] = extern aten.cat.default([%b, %y], 1)
      y1: f32[4, 4] = store set y (i0: 4, i1: 4) [i0, i1] = a[i0, i1]
      return %c }"""
    assert predecessors(parse_graph(text)) == (frozenset(), {0}, {0, 1}, {0, 2})


@pytest.mark.row("A5", "K2", "L6")
def test_arguments_are_passed_by_the_schema() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        one = custom.options(x)
        two = custom.options(x=x, scale=0.5)
        three = custom.options(x, shift=[3, 4], scale=1.5)
        found = torch.searchsorted(sorted_sequence=x[0, 0, 0], input=one)
        return one, two, three, F.conv2d(x, w, None, padding=1), found

    seen = chk(program, torch.randn(1, 2, 5, 5).sort().values, torch.randn(3, 2, 3, 3), rtol=1e-4, atol=1e-4)
    calls = [line for line in seen.host.splitlines() if "options" in line and "= options" in line]
    assert "scale=1.5" in calls[2]
    assert "shift=[3, 4]" in calls[2]
    assert re.search(r"= convolution\w*\(.*None, ", seen.host)
    torch.compiler.reset()
    with pytest.raises(Exception, match="colour"):
        dcompile.compile(lambda x: custom.options(x, colour=1), cache_dir=None)(torch.randn(3))


@pytest.mark.row("A5")
def test_sizes_are_passed_as_expressions() -> None:
    seen = chk(
        lambda x: custom.ramp(x.shape[0] + 1, 0.5) * 2,
        torch.randn(5),
        also=[(torch.randn(8),)],
        dynamic=True,
    )
    assert len(seen.graphs) == 1
    assert re.search(r"= ramp\w*\(\(1 \+ s\d+\), 0.5\)", seen.host)


@pytest.mark.row("K3")
def test_results_are_learned_from_a_trial() -> None:
    seen = chk(lambda x: (x.index_select(1, torch.tensor([2, 0])), torch.nonzero(x > 0) * 2), torch.randn(4, 5))
    assert not any("nonzero" in op for op in seen.fallbacks)
    sparse = torch.randn(4, 4).to_sparse()
    torch.compiler.reset()
    with pytest.raises(Exception, match="sparse"):
        torch.compile(lambda s, x: torch.sparse.mm(s, x) + 1, backend="dcompile", fullgraph=True)(
            sparse, torch.randn(4, 3)
        )


@pytest.mark.row("K4")
def test_strided_views_reach_the_library_without_a_copy() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.mm(x.permute(1, 0)[2:], w), torch.mm((x * 2).t()[1:], w)

    seen = chk(program, torch.randn(5, 6), torch.randn(5, 3), rtol=1e-4, atol=1e-4)
    assert (seen.K, seen.X, seen.copies) == (1, 2, 0)  # one kernel for x * 2
    copied = chk(lambda x, w: torch.mm(x.t().reshape(3, 10), w), torch.randn(5, 6), torch.randn(10, 3), rtol=1e-4)
    assert (copied.K, copied.X) == (1, 1)


@pytest.mark.row("K5")
def test_operands_of_every_kind() -> None:
    buffer = torch.randn(6)

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        stored = torch.mm(y, y)
        return tuple(
            custom.options(operand, shift=[n, 2])
            for operand in (x, x[1:], x.flip(0), x * 2, (x + 1).view(2, 3), stored, stored.t(), buffer)
        )

    seen = chk(program, torch.randn(6), torch.randn(4, 4), rtol=1e-4, atol=1e-4)
    assert seen.copies == 0
    assert seen.X == 9
    assert seen.K <= 2  # flip, x * 2 and x + 1 need memory


@pytest.mark.row("K6", "K7")
def test_strides_are_those_eager_would_pass() -> None:
    def program(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y = F.conv2d(x, w, padding=1)
        z = F.conv2d(y.relu(), v, padding=1)
        return y, z, torch.mm(w.flatten(1).t(), w.flatten(1))

    image = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    seen = chk(program, image, torch.randn(4, 3, 3, 3), torch.randn(4, 4, 3, 3), rtol=1e-4, atol=1e-4)
    assert seen.result[0].is_contiguous(memory_format=torch.channels_last)
    assert seen.K == 1  # the relu between the convolutions; no layout is converted
    chk(lambda x, w: F.conv2d(x * 2, w), torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), rtol=1e-4, atol=1e-4)
    chk(lambda x, w: torch.mm(x.expand(4, 5), w), torch.randn(1, 5), torch.randn(5, 2), rtol=1e-4, atol=1e-4)
    chk(lambda x, w: torch.mm(x, w), torch.empty(0, 5), torch.randn(5, 2))


@pytest.mark.row("K8")
def test_a_layout_that_is_not_as_promised_is_named() -> None:
    def program(x: Tensor) -> Tensor:
        return custom.liar(x) * 2

    torch.compiler.reset()
    with pytest.raises(CompilerBug, match=r"dcompile_rows.liar.default at test_library.py:\d+ gave .*strides \[1, 4\]"):
        dcompile.compile(program, cache_dir=None)(torch.randn(4, 3))
    seen = chk(lambda x: custom.options(x) * 2, torch.randn(4), assert_layouts=False)
    assert "rt.expect" not in seen.host
    assert "rt.expect" in chk(lambda x: custom.options(x) * 2, torch.randn(4)).host


@pytest.mark.row("K9", "U1")
def test_planned_memory_and_the_librarys_own() -> None:
    def program(x: Tensor) -> Tensor:
        a = torch.mm(x, x)
        b = torch.mm(a, x)
        c = torch.mm(b, x)
        return (custom.options(c) * 2).sum(0)

    seen = chk(program, torch.randn(8, 8), rtol=1e-3, atol=1e-3)
    what = [event.what for event in seen.memory]
    assert what.count("reuse") >= 1  # of the first product's bytes
    (own,) = (event for event in seen.memory if event.what == "library")
    assert own.home is Home.LIBRARY
    assert seen.host.count("out=") == 3


@pytest.mark.row("K10")
def test_views_and_waits_produce_no_code_and_keep_the_order() -> None:
    text = """graph g(x: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      v: f32[2, 4] = view a (i0: 2, i1: 4) -> [i0, i1]
      b: f32[2, 4] = extern aten.relu.default(%v)
      return %b }"""
    plan = plan_memory(parse_graph(text), context())
    host = print_host(plan, CppModule(""))
    assert predecessors(plan.graph)[2] == {0, 1}
    assert [line.split("=")[0].strip() for line in host.splitlines() if "rt.op" in line] == ["mm_out", "relu"]
    assert "storage v" not in describe_memory(plan)


@pytest.mark.row("K11")
def test_a_dense_result_is_addressed_by_one_variable() -> None:
    image = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    seen = chk(lambda x, w: F.conv2d(x, w).relu() * 2, image, torch.randn(4, 3, 3, 3), rtol=1e-4, atol=1e-4)
    (kernel,) = (node for node in seen.plan.graph.nodes if isinstance(node, Kernel))
    (nest,) = kernel.body
    assert isinstance(nest, Nest)
    assert len(nest.axes) == 1


@pytest.mark.row("L4")
def test_the_device_of_a_call() -> None:
    seen = chk(lambda: custom.ramp(5, 0.5) * 2)
    assert seen.X == 1
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"ramp|meta"):
        dcompile.compile(lambda x: custom.options(x), cache_dir=None)(torch.randn(3, device="meta"))


@pytest.mark.row("L5")
def test_overloads_are_kept_apart() -> None:
    def program(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.repeat_interleave(x, 3),
            torch.repeat_interleave(x, 2, dim=0, output_size=8),
            torch.repeat_interleave(counts, output_size=10),
            torch.repeat_interleave(x, counts, dim=0, output_size=10),
        )

    seen = chk(program, torch.randn(4), torch.tensor([1, 2, 3, 4]))
    assert "aten.repeat_interleave.Tensor" in seen.externs
