"""Waits are direct and unique, noise is gone. Graphs are written by hand: a before and an after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dcompile.capture.normalise import normalise

comm = torch.ops._c10d_functional
aten = torch.ops.aten


def _trace(program: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """A graph with ``meta["val"]``; collectives are taken for identities, which is right for shapes of all_reduce."""
    gm = fx.symbolic_trace(program)

    class Shapes(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if "c10d_functional" in str(target):
                return [t + 0 for t in args[0]] if isinstance(args[0], list) else args[0] + 0
            return super().call_function(target, args, kwargs)

        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Shapes(gm).run(*inputs)
    return gm


def _after(program: Callable[..., Any], *inputs: torch.Tensor) -> str:
    gm = _trace(program, *inputs)
    normalise(gm)
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = str(node.target).split(".")[1] if "." in str(node.target) else node.target.__name__
            lines.append(f"{node.name} = {name} {' '.join(str(a) for a in node.args if not isinstance(a, str))}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
    return "\n".join(lines)


def test_wait_on_a_view_waits_for_the_result() -> None:
    def program(x: Any) -> Any:
        r = comm.all_reduce.default(x, "sum", "g")
        v = aten.view.default(r, [2, 3])
        comm.wait_tensor.default(v)
        return aten.sin.default(v), aten.cos.default(r)

    assert _after(program, torch.rand(6)).splitlines() == [
        "all_reduce_default = all_reduce x",
        "wait_tensor_default_1 = wait_tensor all_reduce_default",
        "view_default_1 = view wait_tensor_default_1 [2, 3]",
        "sin_default = sin view_default_1",
        "cos_default = cos wait_tensor_default_1",
        "return (sin_default, cos_default)",
    ]


def test_view_of_a_view_is_made_anew_over_the_waited_tensor() -> None:
    def program(x: Any) -> Any:
        r = comm.all_reduce.default(x, "sum", "g")
        v = aten.select.int(aten.view.default(r, [1, 3]), 0, 0)
        w = comm.wait_tensor.default(r)
        return aten.add.Tensor(v, w)

    lines = _after(program, torch.rand(3)).splitlines()
    assert lines[1] == "wait_tensor_default = wait_tensor all_reduce_default"
    assert lines[2].endswith("= view wait_tensor_default [1, 3]")
    assert lines[3].startswith("select_int_1 = select view_default_1")
    assert lines[4] == "add_tensor = add select_int_1 wait_tensor_default"


def test_second_wait_goes() -> None:
    def program(x: Any) -> Any:
        w = comm.wait_tensor.default(comm.all_reduce.default(x, "sum", "g"))
        return aten.sin.default(comm.wait_tensor.default(w))

    assert _after(program, torch.rand(6)).count("wait_tensor ") == 1


def test_two_waits_of_one_result_become_one() -> None:
    def program(x: Any) -> Any:
        r = comm.all_reduce.default(x, "sum", "g")
        return aten.add.Tensor(comm.wait_tensor.default(r), comm.wait_tensor.default(r))

    lines = _after(program, torch.rand(6)).splitlines()
    assert lines[1:3] == [
        "wait_tensor_default = wait_tensor all_reduce_default",
        "add_tensor = add wait_tensor_default wait_tensor_default",
    ]


def test_read_before_the_wait_moves_the_wait_up() -> None:
    def program(x: Any) -> Any:
        r = comm.all_reduce.default(x, "sum", "g")
        y = aten.sin.default(r)
        return aten.add.Tensor(y, comm.wait_tensor.default(r))

    lines = _after(program, torch.rand(6)).splitlines()
    assert [line.split(" = ")[-1].split()[0] for line in lines[:-1]] == ["all_reduce", "wait_tensor", "sin", "add"]


def test_unwaited_output_and_unused_launch_stay() -> None:
    def program(x: Any) -> Any:
        comm.all_reduce.default(x, "sum", "g")
        return comm.all_reduce.default(aten.sin.default(x), "sum", "g")

    lines = _after(program, torch.rand(6)).splitlines()
    assert len(lines) == 4
    assert not any("wait_tensor" in line for line in lines)


def test_wait_of_an_input_stays_and_of_a_computed_value_goes() -> None:
    def program(x: Any) -> Any:
        y = aten.sin.default(comm.wait_tensor.default(x))  # launched by an earlier graph
        return aten.cos.default(comm.wait_tensor.default(y))

    assert _after(program, torch.rand(6)).splitlines()[:3] == [
        "wait_tensor_default = wait_tensor x",
        "sin_default = sin wait_tensor_default",
        "cos_default = cos sin_default",
    ]


def test_coalesced_results_are_waited_for_one_by_one() -> None:
    def program(x: Any, y: Any) -> Any:
        both = comm.all_reduce_coalesced.default([x, y], "sum", "g")
        a = comm.wait_tensor.default(both[0])
        v = aten.view.default(both[1], [3, 2])
        comm.wait_tensor.default(v)
        return aten.sin.default(a), aten.cos.default(v)

    lines = _after(program, torch.rand(6), torch.rand(6)).splitlines()
    assert [line.split(" = ")[1].split()[0] for line in lines[:-1]] == [
        "all_reduce_coalesced", "getitem", "wait_tensor", "getitem", "wait_tensor", "view", "sin", "cos",
    ]  # fmt: skip


def test_copy_of_a_waited_tensor_is_the_tensor() -> None:
    def program(x: Any) -> Any:
        w = comm.wait_tensor.default(comm.all_reduce.default(x, "sum", "g"))
        return aten.sin.default(aten.copy.default(x, w))

    assert "copy" not in _after(program, torch.rand(6))


def test_converting_copy_and_returned_waited_tensor_stay() -> None:
    def converting(x: Any, y: Any) -> Any:
        w = comm.wait_tensor.default(comm.all_reduce.default(x, "sum", "g"))
        return aten.sin.default(aten.copy.default(y, w))

    def returned(x: Any) -> Any:
        w = comm.wait_tensor.default(comm.all_reduce.default(x, "sum", "g"))
        return w, aten.copy.default(x, w)

    assert "copy" in _after(converting, torch.rand(6), torch.rand(6, dtype=torch.float64))
    assert "copy" in _after(returned, torch.rand(6))


def test_detach_goes_unless_it_is_returned() -> None:
    def program(x: Any) -> Any:
        y = aten.sin.default(aten.detach.default(x))
        return y, aten.detach.default(y)

    assert _after(program, torch.rand(6)).splitlines() == [
        "sin_default = sin x",
        "detach_default_1 = detach sin_default",
        "return (sin_default, detach_default_1)",
    ]


def test_autograd_namespace_becomes_the_plain_one() -> None:
    def program(x: Any) -> Any:
        op = torch.ops._c10d_functional_autograd.all_gather_into_tensor.default
        return comm.wait_tensor.default(op(x, 1, "g"))

    gm = _trace(program, torch.rand(6))
    normalise(gm)
    (launch,) = [node for node in gm.graph.nodes if "all_gather" in node.name]
    assert launch.target is comm.all_gather_into_tensor.default
