"""Mutating collectives become functional ones."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from dcompile.capture.functional import functionalise_collectives

comm = torch.ops._c10d_functional


def _names(gm: fx.GraphModule) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("name", "extra"), [("all_reduce_", ("sum", "g")), ("broadcast_", (0, "g"))])
@pytest.mark.parametrize("overload", [False, True])
def test_in_place_becomes_launch_wait_copy(name: str, extra: tuple[Any, ...], overload: bool) -> None:
    op = getattr(comm, name)
    op = op.default if overload else op
    gm = fx.symbolic_trace(lambda x: op(x, *extra) + 1)
    functionalise_collectives(gm)
    assert _names(gm) == [
        f"_c10d_functional.{name.removesuffix('_')}",
        "_c10d_functional.wait_tensor",
        "aten.copy_",
        str(operator.add),
    ]
    x, launch, wait, copy, add, _ = gm.graph.nodes
    assert launch.args == (x, *extra)
    assert copy.args == (x, wait)
    assert add.args == (x, 1)  # the op's result is its argument


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("all_reduce_", {"group_name": "g", "reduce_op": "sum"}),
        ("broadcast_", {"group_name": "g", "src": 0}),
        ("all_reduce_", {"reduce_op": "sum", "group_name": "g", "input": None}),
    ],
)
def test_keywords_may_come_in_any_order(name: str, keywords: dict[str, Any]) -> None:
    def program(x: Any) -> Any:
        given = {key: x if key == "input" else value for key, value in keywords.items()}
        return getattr(comm, name)(*([] if "input" in given else [x]), **given) * 2

    gm = fx.symbolic_trace(program)
    functionalise_collectives(gm)
    x, launch, wait, copy, mul, _ = gm.graph.nodes
    order = ["reduce_op" if name == "all_reduce_" else "src", "group_name"]
    assert launch.args == (x, *(keywords[key] for key in order))
    assert copy.args == (x, wait)
    assert mul.args == (x, 2)


def test_coalesced_in_place_writes_every_tensor() -> None:
    def f(x: Any, y: Any) -> Any:
        both = comm.all_reduce_coalesced_([x, y], "sum", "g")
        return both[1] + both[0]

    gm = fx.symbolic_trace(f)
    functionalise_collectives(gm)
    x, y = gm.graph.find_nodes(op="placeholder")
    copies = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert [copy.args[0] for copy in copies] == [x, y]
    (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    assert add.args == (y, x)


@pytest.mark.parametrize(
    ("name", "extra"), [("all_gather_into_tensor_out", (2, "g")), ("reduce_scatter_tensor_out", ("sum", 2, "g"))]
)
def test_out_form_writes_out(name: str, extra: tuple[Any, ...]) -> None:
    gm = fx.symbolic_trace(lambda x, y: getattr(comm, name)(x, *extra, out=y) * 2)
    functionalise_collectives(gm)
    x, y, launch, wait, copy, mul, _ = gm.graph.nodes
    assert launch.args == (x, *extra)
    assert copy.args == (y, wait)
    assert mul.args == (y, 2)


def test_graph_without_mutating_collectives_is_untouched() -> None:
    gm = fx.symbolic_trace(lambda x: comm.wait_tensor(comm.all_reduce(x, "sum", "g")))
    before = str(gm.graph)
    functionalise_collectives(gm)
    assert str(gm.graph) == before
