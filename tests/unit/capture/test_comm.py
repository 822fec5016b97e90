"""Which nodes communicate, and that dead-code elimination leaves them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import fx
from torch.fx import node as fx_node

from dcompile.capture.comm import (
    collectives_have_effects,
    communication,
    eliminate_dead_code,
    is_launch,
    is_view,
    is_wait,
    view_root,
)

comm = torch.ops._c10d_functional
aten = torch.ops.aten


def test_marks_are_put_back() -> None:
    before = set(fx_node._side_effectful_functions)
    with collectives_have_effects():
        assert comm.all_reduce.default in fx_node._side_effectful_functions
        with collectives_have_effects(False):
            assert comm.wait_tensor.default not in fx_node._side_effectful_functions
        assert comm.all_reduce.default in fx_node._side_effectful_functions
    assert fx_node._side_effectful_functions == before


def test_marks_of_two_threads_do_not_mix() -> None:
    before = set(fx_node._side_effectful_functions)
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        with collectives_have_effects():
            inside.set()
            leave.wait(10)

    def second() -> None:
        with collectives_have_effects(False):
            seen.append(comm.wait_tensor.default in fx_node._side_effectful_functions)
        with collectives_have_effects():
            seen.append(comm.all_reduce.default in fx_node._side_effectful_functions)

    threads = [threading.Thread(target=target, daemon=True) for target in (first, second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert not seen, "the second thread waits for the first"
    assert comm.wait_tensor.default in fx_node._side_effectful_functions
    leave.set()
    for thread in threads:
        thread.join(10)
    assert seen == [False, True]
    assert fx_node._side_effectful_functions == before


def test_marks_others_add_meanwhile_stay() -> None:
    def theirs() -> None: ...

    with collectives_have_effects():
        fx_node._side_effectful_functions.add(theirs)
    assert theirs in fx_node._side_effectful_functions
    fx_node._side_effectful_functions.discard(theirs)


def test_nodes_are_told_apart() -> None:
    def program(x: Any) -> Any:
        r = comm.all_reduce(x, "sum", "g")  # a packet, as Dynamo leaves it
        w = comm.wait_tensor.default(r)
        return aten.select.int(aten.view.default(w, [2, 3]), 0, 1) + 1

    x, launch, wait, view, select, add, output = fx.symbolic_trace(program).graph.nodes
    assert [communication(node) for node in (x, launch, wait, view, add)] == ["", "all_reduce", "wait_tensor", "", ""]
    assert [is_launch(node) for node in (x, launch, wait, view)] == [False, True, False, False]
    assert [is_wait(node) for node in (x, launch, wait, view)] == [False, False, True, False]
    assert [is_view(node) for node in (launch, wait, view, select, add)] == [False, False, True, True, False]
    assert view_root(select) is wait
    assert view_root(output) is output


def test_dead_code_goes_and_dead_communication_stays_with_what_it_needs() -> None:
    def program(x: Any) -> Any:
        comm.all_reduce.default(aten.sin.default(x), "sum", "g")
        aten.cos.default(x)
        return x

    gm = fx.symbolic_trace(program)
    eliminate_dead_code(gm)
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [
        aten.sin.default,
        comm.all_reduce.default,
    ]
