"""Rows G: layouts. Strides belong to a frozen Value: a layout is never undecided and never changes under a reader.

The lowering gives every value the strides eager gives it. One pass, ``choose_layouts``, replaces values that nobody but
loops can see by values in a better order; what callers, libraries and collectives see is out of its reach. A row about
layouts that freeze is reached by that split.
"""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor

from dcompile.analyse.alias import strided_views
from dcompile.collectives.rules import is_contiguous
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.types import DType, Value, contiguous_stride
from dcompile.plan import Home
from dcompile.schedule.fuse import fuse
from dcompile.schedule.layout import choose_layouts, dense_stride, dimension_order
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import chk
from tests.unit.schedule.passes import context

CHANNELS_LAST = (0, 2, 3, 1)


def value(shape: tuple[int, ...], stride: tuple[int, ...]) -> Value:
    return Value("v", DType.F32, shape, stride)


@pytest.mark.row("G1")
def test_a_layout_is_a_value() -> None:
    a = value((2, 3), (3, 1))
    assert a == value((2, 3), (3, 1))
    assert a != value((2, 3), (1, 2))
    assert a != replace(a, dtype=DType.F64)
    assert a != replace(a, device="cuda")
    assert len({a, value((2, 3), (3, 1))}) == 1
    with pytest.raises(FrozenInstanceError):
        a.stride = (1, 2)  # type: ignore[misc]
    assert (a.storage_elements, a.nbytes) == (6, 24)
    assert value((0, 3), (3, 1)).storage_elements == 0
    text = "graph g(x: f32[10]) { v: f32[2, 3] = view x (i0: 2, i1: 3) -> [4 + 3*i0 + i1]  return %v }"
    view = strided_views(parse_graph(text))["v"]
    assert view is not None
    assert view.offset + value(view.shape, view.stride).storage_elements == 10  # type: ignore[arg-type]


def addresses(graph: Graph) -> str:
    (kernel,) = (node for node in fuse(graph, context()).nodes if isinstance(node, Kernel))
    return print_graph(Graph("k", graph.inputs, (kernel,), graph.outputs))


@pytest.mark.row("G2")
def test_addresses_leave_out_dimensions_of_size_1() -> None:
    text = """graph g(x: f32[4, 1, 3]{3, 777, 1}) {
      y: f32[4, 1, 3] = pointwise (i0: 4, i1: 1, i2: 3) x[i0, i1, i2] * 2.0:f32
      return %y }"""
    assert "777" not in addresses(parse_graph(text)).partition("kernel")[2]
    assert contiguous_stride((4, 1, 3)) == (3, 3, 1)
    chk(lambda x: x * 2, torch.randn(4, 3).as_strided((4, 1, 3), (3, 777, 1)))


@pytest.mark.row("G3")
def test_only_values_nobody_sees_change_their_layout() -> None:
    text = """graph g(x: f32[4, 6]{1, 4}) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])
      b: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(a[i0, i1])
      s: f32[4] = reduce sum (i0: 4; r0: 6) a[i0, r0]
      return %b, %s }"""
    before = parse_graph(text)
    after = choose_layouts(before, context())
    assert after.value("a").stride == (1, 4)
    assert after.value("b").stride == before.value("b").stride == (6, 1)
    assert before.value("a").stride == (6, 1)  # the pass made a new graph
    assert choose_layouts(after, context()) == after  # decided once and for all


@pytest.mark.row("G3", "G4")
def test_three_ways_to_channels_last_agree() -> None:
    shape = (2, 3, 4, 5)
    eager = torch.empty(shape, memory_format=torch.channels_last).stride()
    assert dense_stride(shape, CHANNELS_LAST) == eager
    assert dense_stride(shape, dimension_order(eager)) == eager
    sizes, axes, at = "2, 3, 4, 5", "i0: 2, i1: 3, i2: 4, i3: 5", "i0, i1, i2, i3"
    text = f"""graph g(x: f32[{sizes}]{{{", ".join(map(str, eager))}}}) {{
      a: f32[{sizes}] = pointwise ({axes}) exp(x[{at}])
      s: f32[2] = reduce sum (i0: 2; r0: 3, r1: 4, r2: 5) a[i0, r0, r1, r2]
      return %s }}"""
    assert choose_layouts(parse_graph(text), context()).value("a").stride == eager


@pytest.mark.row("G4")
@pytest.mark.parametrize("rank", [4, 5])
def test_orders_and_strides_are_each_others_inverse(rank: int) -> None:
    shape = tuple(range(2, 2 + rank))
    for order in itertools.permutations(range(rank)):
        stride = dense_stride(shape, order)
        assert dimension_order(stride) == order
        expected = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(rank)]).stride()
        assert stride == expected
    assert dimension_order((4, 1, 1, 4)) == (0, 3, 1, 2)  # ties keep the order of dimensions


@pytest.mark.row("G5", "G6")
def test_contiguity_is_eagers() -> None:
    base = torch.empty(4000)
    cases = [((2, 3), (1, 2)), ((3, 3), (1, 3)), ((2, 3, 1, 1), (3, 1, 3, 3)), ((4, 5), (10, 1)), ((4, 5), (1, 0))]
    cases += [((4, 5), (0, 1)), ((1, 5), (77, 1)), ((0, 3), (9, 9)), ((2, 0, 3), (3, 3, 1)), ((2, 3, 4), (12, 4, 1))]
    for shape, stride in cases:
        assert is_contiguous(value(shape, stride)) == base.as_strided(shape, stride).is_contiguous()
    for shape in ((2, 3), (3, 3)):
        assert dimension_order((1, shape[0])) == (1, 0)  # a transposed matrix, square or not
    assert dimension_order((10, 1)) == (0, 1)  # ordered, and not dense
    assert dimension_order((1, 0)) == (0, 1)
    assert dimension_order((0, 1)) == (1, 0)


@pytest.mark.row("G5")
def test_images_of_one_pixel_are_both() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, (x + 1).contiguous(memory_format=torch.channels_last)

    chk(program, torch.randn(2, 3, 1, 1))
    chk(program, torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))


@pytest.mark.row("G6")
def test_a_library_gets_dense_memory_where_it_needs_it() -> None:
    def program(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.expand(4, 5)
        return torch.mm(rows, w), torch.mm(w, rows[:, 1:].t() * 2)

    chk(program, torch.randn(1, 5), torch.randn(5, 4), rtol=1e-4)
    chk(lambda x, w: x[:, :5] @ w, torch.randn(4, 10), torch.randn(5, 3), rtol=1e-4)


@pytest.mark.row("G7")
def test_parts_of_a_concatenation_live_in_it() -> None:
    def program(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.cat([torch.mm(a, a).view(-1)[:16], torch.mm(b, b).view(-1), (c * 2).cumsum(0).exp()])

    seen = chk(program, torch.randn(4, 4), torch.randn(3, 3), torch.randn(7), rtol=1e-4)
    whole = next(storage for storage in seen.plan.storages.values() if storage.home is Home.FRESH)
    inside = sorted(
        int(slot.offset) for name, slot in seen.plan.slots.items() if slot.storage == whole.name and slot.offset != 0
    )
    assert 16 * 4 in inside  # a multiple of 16 bytes
    assert (16 + 9) * 4 in inside  # not one: kernels on a GPU look at each address before they count on it


@pytest.mark.row("G8")
def test_a_step_without_a_result_allocates_nothing() -> None:
    def program(x: Tensor) -> Tensor:
        torch.ops.dcompile_rows.note(x)
        return x + 1

    seen = chk(program, torch.randn(5))
    (step,) = (step for step in seen.schedule if step.kind == "extern")
    assert (step.makes, step.mutates) == ((), ())
    assert all(event.position != step.position for event in seen.memory)


@pytest.mark.row("G9")
def test_a_library_call_with_two_results_is_one_call() -> None:
    seen = chk(lambda x: torch.topk(x, 3), torch.randn(4, 9))
    assert (seen.K, seen.X, seen.copies) == (0, 1, 0)
    (step,) = (step for step in seen.schedule if step.kind == "extern")
    assert len(step.makes) == 2


@pytest.mark.row("G10")
def test_a_write_into_a_view_writes_its_base() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        x[:, 1:3].add_(y)
        return x.sum()

    seen = chk(program, torch.randn(4, 6), torch.randn(4, 2))
    assert seen.copies == 0
    only = chk(lambda x, y: x[:, 1:3].add_(y), torch.randn(4, 6), torch.randn(4, 2))
    assert (only.K, only.X, only.copies) == (1, 0, 0)
    assert not only.memory  # no memory but the caller's


@pytest.mark.row("G11")
def test_results_follow_the_layout_of_their_inputs() -> None:
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    seen = chk(lambda x: torch.relu(x) + 1, image)
    assert seen.K == 1
    assert seen.result.is_contiguous(memory_format=torch.channels_last)
    chk(lambda w: (w.expand(4, 6) * 2).exp(), torch.randn(6))
    chk(lambda x, y: (x.t() * 2, x.t() + y, (x + y.t()).sum(0)), torch.randn(4, 6), torch.randn(6, 4))
