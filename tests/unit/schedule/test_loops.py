from __future__ import annotations

import sympy

from dcompile.collectives.text import parse_graph
from dcompile.ir import expr as ex
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Pointwise, Reduction, Store
from dcompile.schedule.loops import Domain, Form, coefficient, form_of, place


def first_form(text: str) -> Form:
    graph = parse_graph(text)
    node = graph.nodes[0]
    assert isinstance(node, Pointwise | Reduction | Store)
    return form_of(graph, node)


def test_contiguous_axes_merge_into_one() -> None:
    form = first_form(
        """graph f(x: f32[8, 16, 32]) {
             y: f32[8, 16, 32] = pointwise (i0: 8, i1: 16, i2: 32) exp(x[i0, i1, i2])
             return %y }"""
    )
    assert [size for _, size in form.axes] == [4096]


def test_a_broadcast_keeps_axes_apart() -> None:
    form = first_form(
        "graph f(x: f32[8, 4], w: f32[4]) { y: f32[8, 4] = pointwise (i0: 8, i1: 4) x[i0, i1] * w[i1]\n return %y }"
    )
    assert [size for _, size in form.axes] == [8, 4]


def test_axes_run_in_the_order_of_the_results_strides() -> None:
    form = first_form(
        """graph f(x: f32[2, 3, 5]) {
             y: f32[2, 3, 5]{15, 1, 3} = pointwise (i0: 2, i1: 3, i2: 5) exp(x[i0, i1, i2])
             return %y }"""
    )
    assert [size for _, size in form.axes] == [2, 5, 3]
    assert coefficient(form.address, form.axes[-1][0]) == 1


def test_a_reshaped_read_loses_its_division() -> None:
    form = first_form(
        """graph f(x: f32[6, 4]) {
             y: f32[2, 3, 4] = pointwise (i0: 2, i1: 3, i2: 4) exp(x[(12*i0 + 4*i1 + i2) // 4, (12*i0 + 4*i1 + i2) % 4])
             return %y }"""
    )
    assert [size for _, size in form.axes] == [24]
    (load,) = ex.loads(form.expr)
    assert load.index == (form.axes[0][0],)


def test_a_flat_loop_splits_into_rows_and_columns() -> None:
    form = first_form("graph f(x: f32[24]) { y: f32[24] = pointwise (i0: 24) exp(x[i0])\n return %y }")
    placed = place(form, Domain((6,), (4,)), "row")
    assert placed is not None
    assert placed.address == sympy.expand(4 * symbol("p0") + symbol("r0"))


def test_a_split_that_would_divide_in_the_innermost_loop_is_refused() -> None:
    form = first_form(
        "graph f(x: f32[4, 6], w: f32[4]) { y: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] * w[i0]\n return %y }"
    )
    assert place(form, Domain((3,), (8,)), "row") is None
