"""Rows F: views. A view is an index map on its base; it costs nothing until somebody needs other memory."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dcompile
from dcompile.analyse.alias import strided_views
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.nodes import View
from dcompile.lower.builder import loop_axes
from dcompile.lower.sizes import Sizes
from dcompile.lower.view import reshape_index
from tests.rows.check import chk, rejects


@pytest.mark.row("F1", "F3")
def test_a_view_of_a_computed_value_stays_symbolic() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x + 1).t() * 2, (y * 3).permute(2, -3, 1).exp()

    seen = chk(program, torch.randn(5, 7), torch.randn(2, 3, 4))
    assert (seen.K, seen.X, seen.copies) == (2, 0, 0)


@pytest.mark.row("F1")
def test_a_view_that_a_library_needs_stores_its_base_once() -> None:
    seen = chk(lambda x, w: torch.mm((x + 1).t(), w), torch.randn(5, 7), torch.randn(5, 3))
    assert (seen.K, seen.X, seen.copies) == (1, 1, 0)


@pytest.mark.row("F2")
def test_expand() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x.expand(2, -1, 4), y.expand(0, 3), (x * 2).expand(3, 4).exp(), x.expand(3, 1)

    seen = chk(program, torch.randn(3, 1), torch.randn(1, 3))
    assert seen.result[0].stride() == (0, 1, 0)
    assert seen.K == 1


@pytest.mark.row("F2")
def test_expand_rejects_what_eager_rejects() -> None:
    rejects(lambda x: x.expand(-1, 3), torch.randn(3))
    rejects(lambda x: x.expand(4) + 1, torch.randn(3))
    rejects(lambda x: x.expand(3, 5) + 1, torch.randn(2, 5))


@pytest.mark.row("F2")
def test_a_dynamic_expand_that_does_not_fit_is_rejected() -> None:
    compiled = dcompile.compile(lambda x, y: x.expand(y.shape) + y, dynamic=True, cache_dir=None)
    x, y = torch.randn(1, 6), torch.randn(5, 6)
    torch.testing.assert_close(compiled(x, y), x.expand(5, 6) + y)
    with pytest.raises(RuntimeError):
        compiled(torch.randn(1, 6), torch.randn(5, 7))


@pytest.mark.row("F3")
def test_permute_of_an_input_is_no_work() -> None:
    seen = chk(lambda x: x.permute(2, -3, 1), torch.randn(2, 3, 4))
    assert (seen.K, seen.X, seen.copies) == (0, 0, 0)
    rejects(lambda x: x.permute(0, 0, 1) + 1, torch.randn(2, 3, 4))


@pytest.mark.row("F4")
def test_squeeze() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x.squeeze(1), y.squeeze(), y.squeeze(0), y.squeeze((0, -1)), (x + 1).squeeze(1)

    seen = chk(program, torch.randn(3, 2), torch.randn(1, 3, 1))
    assert seen.K == 1


@pytest.mark.row("F4")
def test_a_dynamic_dimension_is_squeezed_only_behind_a_guard() -> None:
    seen = chk(
        lambda x: x.squeeze(0) * 2, torch.randn(4, 3), also=[(torch.randn(6, 3),), (torch.randn(1, 3),)], dynamic=True
    )
    assert len(seen.graphs) == 2  # size 1 is another program


@pytest.mark.row("F5")
def test_any_index_map_is_a_view_that_prints_its_map() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1).flip(0).exp(), x.unfold(1, 3, 2) * 2, x.diagonal(1) + 1, torch.diagonal(x, -2) * 3

    seen = chk(program, torch.randn(6, 7))
    assert (seen.K, seen.X) == (4, 0)
    text = "graph g(x: f32[4, 6]) { v: f32[6, 4] = view x (i0: 6, i1: 4) -> [3 - i1, i0]  return %v }"
    assert "-> [3 - i1, i0]" in print_graph(parse_graph(text))


@pytest.mark.row("F6")
def test_reshape_is_a_view_where_it_can_be() -> None:
    seen = chk(lambda x: (x.view(x.shape), x.reshape(4, 6), x.view(2, 2, 6)), torch.randn(4, 6))
    assert (seen.K, seen.X, seen.copies) == (0, 0, 0)
    forced = chk(lambda x: x.t().reshape(-1), torch.randn(4, 6))
    assert (forced.K, forced.X, forced.copies) == (1, 0, 0)
    fused = chk(lambda x: x.t().reshape(-1) * 2, torch.randn(4, 6))
    assert (fused.K, fused.X, fused.copies) == (1, 0, 0)


@pytest.mark.row("F7")
def test_minus_one_in_a_shape() -> None:
    def program(x: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return e.view(-1, 3), x.view(-1, 2, 3) * 2, x.reshape(-1)

    chk(program, torch.randn(4, 3), torch.empty(0, 3))
    seen = chk(lambda x: x.view(-1, 4) + 1, torch.randn(20), also=[(torch.randn(28),)], dynamic=True)
    assert len(seen.graphs) == 1
    rejects(lambda x: x.view(-1, 0) + 1, torch.empty(0, 3))
    rejects(lambda x: x.view(-1, -1) + 1, torch.randn(4, 3))
    rejects(lambda x: x.view(5, 3) + 1, torch.randn(4, 3))


GOLDEN = {
    ((4, 6), (24,)): "i0//6, i0%6",
    ((24,), (4, 6)): "6*i0 + i1",
    ((2, 3, 4), (2, 12)): "i0, i1//4, i1%4",
    ((4, 3, 2), (2, 2, 6)): "2*i0 + i1, i2//2, i2%2",
}
"""Maps that group dimensions instead of going through the flat position; the outermost remainder is known away."""


@pytest.mark.row("F8")
@pytest.mark.parametrize(("old", "new"), list(GOLDEN))
def test_reshape_maps_group_dimensions(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    axes = loop_axes(new)
    sizes = ", ".join(map(str, old)), ", ".join(map(str, new)), ", ".join(f"{v}: {n}" for v, n in axes)
    text = (
        f"graph g(x: f32[{sizes[0]}]) {{ v: f32[{sizes[1]}] = view x ({sizes[2]}) -> [{GOLDEN[old, new]}] return %v }}"
    )
    (wanted,) = parse_graph(text).nodes
    assert isinstance(wanted, View)
    assert reshape_index(old, new, Sizes()) == wanted.index
    assert_same_order(old, new)


def assert_same_order(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Every point of ``new`` reads the element of the same row-major number."""
    axes, found = loop_axes(new), reshape_index(old, new, Sizes())
    for number, point in enumerate(itertools.product(*(range(n) for n in new))):
        at = {v: sympy.Integer(p) for (v, _), p in zip(axes, point, strict=True)}
        flat = 0
        for size, index in zip(old, found, strict=True):
            here = int(index.xreplace(at))
            assert 0 <= here < size
            flat = flat * size + here
        assert flat == number


@pytest.mark.row("F8")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 6), (2, 12)),
        ((6, 4), (4, 6)),
        ((2, 1, 3), (3, 2)),
        ((6, 10), (15, 4)),
        ((1, 5, 1), (5,)),
        ((6,), (1, 6, 1)),
    ],
)
def test_reshape_maps_through_the_flat_position(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    assert_same_order(old, new)


@st.composite
def shape_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        sizes: list[int] = []
        for factor in draw(st.permutations(factors)):
            if sizes and draw(st.booleans()):
                sizes[-1] *= factor
            else:
                sizes.append(factor)
        return tuple(sizes)

    return grouped(), grouped()


@pytest.mark.row("F8")
@given(shape_pairs())
def test_reshape_maps_of_any_two_shapes(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    if math.prod(pair[0]) <= 300:
        assert_same_order(*pair)


@pytest.mark.row("F9")
def test_views_of_empty_tensors() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        empty = x.view(5, 0)
        return empty, empty + 1, torch.cat([empty, y], 1), x.reshape(0), torch.cat([x.t() * 2, y[:3, :0]], 1)

    chk(program, torch.empty(0, 3), torch.randn(5, 2))


@pytest.mark.row("F10")
def test_a_reshape_to_a_size_that_depends_on_data() -> None:
    def program(t: Tensor) -> Tensor:
        n = t.item()
        return (torch.arange(n * 2).view(n, 2).t().reshape(-1) * 2).view(2, -1)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        seen = chk(program, torch.tensor(5), also=[(torch.tensor(3),)])
    assert len(seen.graphs) == 1  # one program for every size


@pytest.mark.row("F11")
def test_a_slice_of_a_slice_is_one_view() -> None:
    seen = chk(lambda x: x[2:][1:, 3:], torch.randn(8, 9))
    assert (seen.K, seen.X, seen.copies) == (0, 0, 0)
    assert seen.host.count("alias(") == 1
    assert f"{3 * 9 + 3}" in seen.host
    text = """graph g(x: f32[8, 9]) {
      a: f32[6, 9] = view x (i0: 6, i1: 9) -> [2 + i0, i1]
      b: f32[5, 6] {9, 1} = view a (i0: 5, i1: 6) -> [1 + i0, 3 + i1]
      return %b }"""
    found = strided_views(parse_graph(text))["b"]
    assert found is not None
    assert (found.base, found.stride, found.offset) == ("x", (9, 1), 30)


@pytest.mark.row("F12")
def test_slices() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        return x[-3:100], x[8:3], x[-100:2], x[1:9:3], x[:], (x + 1)[1:9:3] * 2, x[4:], x[:-2]

    seen = chk(program, torch.arange(10.0))
    assert seen.K == 1
    rejects(lambda x: x[::0] + 1, torch.randn(4))
    rejects(lambda x: x[::-1] + 1, torch.randn(4))


@pytest.mark.row("F12")
def test_slices_of_dynamic_sizes_clamp() -> None:
    inputs = [(torch.randn(n), torch.randn(m)) for n, m in ((9, 4), (20, 7), (6, 5))]
    seen = chk(lambda x, y: x[2 : 2 + y.shape[0]] * 2, *inputs[0], also=inputs[1:], dynamic=True)
    assert len(seen.graphs) <= 2


@pytest.mark.row("F13")
def test_negative_positions() -> None:
    def program(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x[-1], x[:, -2] * 2, x[i], x.select(1, -1) + 1

    chk(program, torch.randn(5, 6), torch.tensor([-1, 2, -5]))


@pytest.mark.row("F13")
def test_a_position_read_from_a_tensor() -> None:
    more = [(torch.randn(6, 3), torch.tensor(4))]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        seen = chk(lambda x, i: x[i.item()] * 2, torch.randn(6, 3), torch.tensor(-2), also=more)
        compiled = dcompile.compile(lambda x, i: x[i.item()] * 2, cache_dir=None)
        compiled(torch.randn(6, 3), torch.tensor(5))
        for far in (6, -7):
            with pytest.raises((RuntimeError, IndexError), match="out of range"):
                compiled(torch.randn(6, 3), torch.tensor(far))
    assert len(seen.graphs) <= 2  # the tracer may guard on the sign


@pytest.mark.row("F14")
def test_asking_where_a_value_lies_changes_nothing() -> None:
    """Views are resolved by a pure function of the graph; values without memory of their own are not in its answer."""
    text = """graph g(x: f32[4, 6]) {
      a: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] + 1.0:f32
      v: f32[6, 4] {1, 6} = view a (i0: 6, i1: 4) -> [i1, i0]
      f: f32[4, 6] = view a (i0: 4, i1: 6) -> [3 - i0, i1]
      return %v, %f }"""
    graph = parse_graph(text)
    before = print_graph(graph)
    found = strided_views(graph)
    assert set(found) == {"v", "f"}
    assert found["v"] is not None
    assert found["v"].base == "a"
    assert found["f"] is None  # runs backwards: no strided tensor
    assert print_graph(graph) == before
    assert all(isinstance(graph.nodes[graph.producer[name]], View) for name in found)
