"""Functionalised writes become writes again, and only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dcompile.backend import backend
from dcompile.capture import capture
from dcompile.options import Options
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import chk

custom = torch.ops.dcompile_rows


def captured(function: Callable[..., Any], *args: Any) -> list[str]:
    """Targets of the captured graph's calls."""
    found: list[str] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def compile_graph(graph: Any) -> Any:
            found.extend(str(node.target) for node in graph.gm.graph.nodes if node.op == "call_function")
            return lambda inputs: graph.gm(*inputs)

        return capture(gm, example_inputs, compile_graph)

    torch.compiler.reset()
    torch.compile(function, backend=keep)(*args)
    return found


def test_a_write_into_a_slice_of_an_input_is_one() -> None:
    found = captured(lambda x, y: x[1:3].copy_(y), torch.randn(5, 2), torch.randn(2, 2))
    assert "aten.slice_scatter.default" not in found
    assert found.count("aten.copy_.default") == 1


def test_an_old_version_that_is_read_later_forbids_it() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        old = x.sin()
        x[1:3] = y
        return old + x

    # ``sin`` comes first: the write may go to the input
    assert "aten.slice_scatter.default" not in captured(program, torch.randn(5, 2), torch.randn(2, 2))

    def late(x: Tensor, y: Tensor) -> Tensor:
        new = torch.slice_scatter(x, y, 0, 1, 3)
        old = x.sin()
        x.copy_(new)
        return old

    assert "aten.slice_scatter.default" in captured(late, torch.randn(5, 2), torch.randn(2, 2))
    chk(late, torch.randn(5, 2), torch.randn(2, 2))


def test_a_result_apart_from_the_input_stays_apart() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        new = torch.slice_scatter(x, y, 0, 1, 3)
        x.copy_(new)
        return new

    chk(program, torch.randn(5, 2), torch.randn(2, 2))


def test_what_is_saved_for_the_backward_is_no_part_of_an_input() -> None:
    def program(w: Tensor, state: Tensor, y: Tensor) -> Tensor:
        state[1:3] = y
        return (w * state).sum()

    w, state, y = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2), torch.randn(2, 2)
    expected = state.clone()
    expected[1:3] = y
    torch.compiler.reset()
    loss = torch.compile(program, backend=backend(Options.from_env({"cache_dir": None})))(w, state, y)
    state.zero_()  # eager would refuse the backward now; the saved value is the program's own
    loss.backward()
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("dead", [True, False])
def test_a_custom_op_writes_a_copy_if_the_old_value_is_read_later(dead: bool) -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        a = x + 1
        b = a if dead else a.clone()
        custom.bump(b)
        return (b * 2,) if dead else (b * 2, a * 3)

    found = captured(program, torch.randn(5))
    assert "dcompile_rows.bump.default" in found
    assert ("aten.clone.default" in found) != dead
    chk(program, torch.randn(5))


def test_views_and_lists_are_written_through() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        custom.bump(x[1:3])
        custom.bump(x.t()[::2])
        custom.double_all([x, y * 2, y[0]])
        return x * 2, y + 1

    found = captured(program, torch.randn(5, 4), torch.randn(3, 2))
    assert not [name for name in found if "auto_functionalized" in name]
    chk(program, torch.randn(5, 4), torch.randn(3, 2))


def test_symbolic_bounds() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        custom.bump(x[1 : y.shape[0]])
        x[y.shape[0] :] = 2.0
        return x * 2

    chk(program, torch.randn(9, 2), torch.randn(4), also=[(torch.randn(9, 2), torch.randn(6))], dynamic=True)
