from __future__ import annotations

import time

import pytest
import torch
from torch import fx

from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import Unsupported
from dcompile.ir.graph import SizeInput
from dcompile.ir.index import symbol
from dcompile.lower import SizeOf, lower
from tests.unit.lower.harness import check, trace


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_origins_name_op_and_line() -> None:
    gm = trace(lambda x: x.exp().sum(0), randn(3, 4))
    for node in gm.graph.nodes:
        node.meta["dcompile_source"] = "train.py:41"
    origins = [node.origin for node in lower(gm, "forward").graph.nodes]
    assert [o.ops for o in origins] == [("aten.exp.default",), ("aten.sum.dim_IntList",)]
    assert {o.source for o in origins} == {"train.py:41"}


def test_sizes_without_an_input_of_their_own_are_read_off_tensors() -> None:
    lowered = lower(trace(lambda x: x * x.shape[1], randn(5, 6), symbolic=True), "forward")
    sizes = [item for item in lowered.graph.inputs if isinstance(item, SizeInput)]
    assert [item.hint for item in sizes] == [5, 6]
    assert lowered.extra_inputs == (SizeOf(0, 0), SizeOf(0, 1))


def test_integer_inputs_are_sizes() -> None:
    gm = trace(lambda x: x.exp(), randn(5, 6), symbolic=True)
    (place,) = [node for node in gm.graph.nodes if node.op == "placeholder"]
    rows = place.meta["val"].shape[0]
    with gm.graph.inserting_before(place):
        first = gm.graph.placeholder("rows")
        second = gm.graph.placeholder("twice")
    first.meta["val"], second.meta["val"] = rows, rows * 2
    gm.recompile()
    graph = lower(gm, "forward").graph
    head, compound = graph.inputs[:2]
    assert isinstance(head, SizeInput)
    assert isinstance(compound, SizeInput)
    assert (head.symbol, head.hint, compound.hint) == (symbol(str(rows)), 5, 10)


def test_names_never_read_like_loop_variables() -> None:
    graph = fx.Graph()
    x = graph.placeholder("i0")
    x.meta["val"] = torch.empty(3, device="meta").to("meta")
    y = graph.call_function(torch.ops.aten.exp.default, (x,))
    y.meta["val"] = x.meta["val"]
    graph.output((y,))
    lowered = lower(fx.GraphModule(torch.nn.Module(), graph), "forward")
    assert [v.name for v in lowered.graph.inputs] == ["i0_"]


def test_lowered_graphs_print_and_parse() -> None:
    graph = check(
        lambda x, i: (torch.softmax(x[i].tril(), 1), x.view(-1)[3:].mean()), randn(4, 5), torch.tensor([1, 3])
    )
    assert parse_graph(print_graph(graph)) == graph


def test_functions_that_are_no_operators_are_refused_by_name() -> None:
    gm = trace(lambda x: x.sin(), randn(3))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.target = torch.nn.functional.silu
    with pytest.raises(Unsupported, match="silu"):
        lower(gm, "forward")


def test_unknown_element_types_are_refused() -> None:
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        lower(trace(lambda x: x.to(torch.float8_e4m3fn), randn(3)), "forward")


def test_lowering_is_fast() -> None:
    """2000 ops in under two seconds, far above the measured 0.25 s, so that only a blow-up fails."""

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(250):
            x = torch.relu(x.t() + x).view(4, -1, 16).sum(1).view(-1, 4).repeat(1, 4)
        return x

    gm = trace(function, randn(16, 16))
    assert len(gm.graph.nodes) > 1700
    lower(gm, "forward")
    begin = time.perf_counter()
    lower(gm, "forward")
    assert time.perf_counter() - begin < 2.0
