from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dcompile.collectives.nodes import Kind, Start, Wait
from dcompile.errors import Unsupported
from dcompile.ir.nodes import Extern, Pointwise, Store, View
from dcompile.lower import Lowered, lower
from dcompile.reference import run_reference

c10d = torch.ops._c10d_functional
aten = torch.ops.aten


def build(make: Callable[..., Any], *shapes: tuple[int, ...], line: str = "train.py:41") -> fx.GraphModule:
    """An fx graph with fake values, written op by op: ``make(call, *inputs)`` gives the outputs."""
    graph = fx.Graph()
    mode = FakeTensorMode()
    with mode:
        inputs = []
        for n, shape in enumerate(shapes):
            node = graph.placeholder(f"x{n}_in")
            node.meta["val"] = torch.empty(shape)
            inputs.append(node)

        def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = graph.call_function(op, args, kwargs)
            node.meta["val"] = op(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)
            node.meta["dcompile_source"] = line
            return node

        graph.output(make(call, *inputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def lowered(make: Callable[..., Any], *shapes: tuple[int, ...]) -> Lowered:
    return lower(build(make, *shapes), "backward", group_size=lambda name: 2)


def run(found: Lowered, *shapes: tuple[int, ...]) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Inputs as they were and outputs, of two ranks."""
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    outputs: Any = run_reference([found.graph] * 2, pytree.tree_map(torch.clone, inputs))
    return inputs, outputs


def kinds(found: Lowered) -> list[type]:
    return [type(node) for node in found.graph.nodes]


def test_all_reduce() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_reduce.default, x, "sum", "world")),)

    found = lowered(make, (3, 4))
    assert kinds(found) == [Start, Wait]
    assert found.group_names == {"g0": "world"}
    (a, b), outputs = run(found, (3, 4))
    torch.testing.assert_close(outputs[0][0], a[0] + b[0])


@pytest.mark.parametrize("reduction", ["avg", "max", "min", "product"])
def test_reductions(reduction: str) -> None:
    def make(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_reduce.default, x, reduction, "world")),)

    (a, b), outputs = run(lowered(make, (5,)), (5,))
    stacked = torch.stack((a[0], b[0]))
    expected = {"avg": stacked.mean(0), "max": stacked.amax(0), "min": stacked.amin(0), "product": stacked.prod(0)}
    torch.testing.assert_close(outputs[1][0], expected[reduction])


def test_unknown_reduction_names_the_line() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_reduce.default, x, "premul_sum", "world")),)

    with pytest.raises(Unsupported, match=r"train\.py:41: a collective with reduction 'premul_sum'"):
        lowered(make, (3,))


def test_gather_scatter_broadcast_and_all_to_all() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        wait = c10d.wait_tensor.default
        return (
            call(wait, call(c10d.all_gather_into_tensor.default, x, 2, "world")),
            call(wait, call(c10d.reduce_scatter_tensor.default, x, "sum", 2, "world")),
            call(wait, call(c10d.broadcast.default, x, 1, "world")),
            call(wait, call(c10d.all_to_all_single.default, x, [2, 2], [2, 2], "world")),
        )

    found = lowered(make, (4, 3))
    assert [n.kind for n in found.graph.nodes if isinstance(n, Start)] == [
        Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.BROADCAST, Kind.ALL_TO_ALL,
    ]  # fmt: skip
    ((a,), (b,)), outputs = run(found, (4, 3))
    expected = (torch.cat((a, b)), (a + b)[2:], b, torch.cat((a[2:], b[2:])))
    for got, want in zip(outputs[1], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_uneven_splits_send_each_rank_its_rows() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_to_all_single.default, x, [2, 2], [2, 2], "world")),)

    assert lowered(make, (4, 3)).graph.nodes[0].in_splits == (), "equal shares need no splits"  # type: ignore[attr-defined]

    def uneven(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_to_all_single.default, x, [1, 1], [1, 3], "world")),)

    def other(call: Any, x: fx.Node) -> Any:
        return (call(c10d.wait_tensor.default, call(c10d.all_to_all_single.default, x, [3, 0], [1, 0], "world")),)

    programs = [lowered(uneven, (4, 3)).graph, lowered(other, (1, 3)).graph]
    a, b = torch.randn(4, 3), torch.randn(1, 3)
    (first,), (second,) = run_reference(programs, [[a], [b]])
    torch.testing.assert_close(first, torch.cat([a[:1], b]))
    torch.testing.assert_close(second, a[1:])


@pytest.mark.parametrize(
    ("out", "sent", "message"),
    [([1, 3], [3, 2], "of a tensor of 4 rows"), ([4], [4], "1 input splits"), ([4, 1], [5, -1], "at least 0")],
)
def test_splits_that_do_not_make_up_the_rows_are_refused(out: list[int], sent: list[int], message: str) -> None:
    def make(call: Any, x: fx.Node) -> Any:
        node = x.graph.call_function(c10d.all_to_all_single.default, (x, out, sent, "world"))
        node.meta["val"] = x.meta["val"].new_empty(sum(out), 3)
        return (call(c10d.wait_tensor.default, node),)

    with pytest.raises(Unsupported, match=message):
        lowered(make, (4, 3))


def test_coalesced_results_share_one_wait() -> None:
    def make(call: Any, x: fx.Node, y: fx.Node) -> Any:
        both = call(c10d.all_reduce_coalesced.default, [x, y], "sum", "world")
        graph = both.graph
        parts = []
        for n in (1, 0):
            part = graph.call_function(__import__("operator").getitem, (both, n))
            part.meta["val"] = both.meta["val"][n]
            parts.append(call(c10d.wait_tensor.default, part))
        return tuple(parts)

    found = lowered(make, (3,), (4, 2))
    assert kinds(found) == [Start, Wait]
    (a, b), outputs = run(found, (3,), (4, 2))
    torch.testing.assert_close(outputs[0], [a[1] + b[1], a[0] + b[0]])


def test_a_source_that_is_not_dense_is_copied() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        turned = call(aten.t.default, x)
        return (call(c10d.wait_tensor.default, call(c10d.all_reduce.default, turned, "sum", "world")),)

    found = lowered(make, (3, 4))
    assert kinds(found) == [View, Pointwise, Start, Wait]
    (a, b), outputs = run(found, (3, 4))
    torch.testing.assert_close(outputs[0][0], (a[0] + b[0]).t())


def test_a_wait_on_a_view_waits_there_and_the_view_follows() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        reduced = call(c10d.all_reduce.default, x, "sum", "world")
        flat = call(aten.view.default, reduced, [12])
        part = call(aten.slice.Tensor, flat, 0, 2, 5)
        waited = call(c10d.wait_tensor.default, part)
        return (call(aten.mul.Tensor, waited, 2.0), call(aten.add.Tensor, flat, 1.0))

    found = lowered(make, (3, 4))
    assert kinds(found)[:2] == [Start, Wait]
    (a, b), outputs = run(found, (3, 4))
    flat = (a[0] + b[0]).view(12)
    torch.testing.assert_close(outputs[0], [flat[2:5] * 2, flat + 1])


def test_a_result_nobody_waits_for_is_waited_for_at_the_end() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        call(c10d.all_reduce.default, x, "sum", "world")
        return (call(aten.exp.default, x),)

    assert kinds(lowered(make, (3,))) == [Start, Pointwise, Wait]


def test_a_read_before_the_wait_names_the_line() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        reduced = call(c10d.all_reduce.default, x, "sum", "world")
        return (call(aten.exp.default, reduced),)

    with pytest.raises(Unsupported, match=r"train\.py:41: a read of a collective's result before its wait"):
        lowered(make, (3,))


def test_in_place_forms_give_the_next_version() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        fresh = call(aten.mul.Tensor, x, 2.0)
        view = call(aten.slice.Tensor, fresh, 0, 1, 3)
        reduced = call(c10d.all_reduce_.default, fresh, "sum", "world")
        call(c10d.wait_tensor.default, reduced)
        return (call(aten.add.Tensor, fresh, 1.0), call(aten.exp.default, view))

    found = lowered(make, (4,))
    start = next(n for n in found.graph.nodes if isinstance(n, Start))
    assert start.pending.in_place
    (a, b), outputs = run(found, (4,))
    total = 2 * (a[0] + b[0])
    torch.testing.assert_close(outputs[0], [total + 1, total[1:3].exp()])


def test_a_read_of_a_buffer_in_flight_is_refused() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        call(c10d.all_reduce_.default, x, "sum", "world")
        return (call(aten.exp.default, x),)

    with pytest.raises(Unsupported, match="before its wait"):
        lowered(make, (3,))


def test_a_write_to_a_source_in_flight_waits_first() -> None:
    def make(call: Any, x: fx.Node, y: fx.Node) -> Any:
        call(c10d.all_reduce.default, x, "sum", "world")
        return (call(aten.copy_.default, x, y),)

    assert kinds(lowered(make, (3,), (3,))) == [Start, Wait, Store]


def test_groups_are_slots_in_order_of_first_use() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        out = x
        for group in ("b", "a", "b"):
            out = call(c10d.wait_tensor.default, call(c10d.all_reduce.default, out, "sum", group))
        return (out,)

    found = lowered(make, (3,))
    assert found.group_names == {"g0": "b", "g1": "a"}
    assert [n.group.label for n in found.graph.nodes if isinstance(n, Start)] == ["g0", "g1", "g0"]


def test_a_communicating_op_without_rule_is_a_barrier() -> None:
    def make(call: Any, x: fx.Node) -> Any:
        return (call(c10d.all_reduce.default, x, "sum", "world"),)

    gm = build(make, (3,))
    found = lower(gm, "backward", frozenset({"all_reduce"}), lambda name: 2)
    (node,) = found.graph.nodes
    assert isinstance(node, Extern)
    assert (node.barrier, node.fallback) == (True, False)
