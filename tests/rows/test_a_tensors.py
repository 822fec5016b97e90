"""Rows A: what lowering rules return, scalars, fake tensors, devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.kernel import Kernel, expressions
from dcompile.ir.types import DType, Value
from dcompile.lower.walk import checked
from dcompile.schedule.split import CPU
from dcompile.schedule.stages import processor_of
from tests.rows.check import chk
from tests.rows.test_c_reductions import context


@pytest.mark.row("A2")
@pytest.mark.parametrize("wrong", [{1, 2}, object(), [[{"a": {3}}]], ex.const(1.0, DType.F32), iter(())])
def test_rules_that_return_something_else(wrong: Any) -> None:
    with pytest.raises(CompilerBug, match=r"rule of aten\.my\.default returned a (set|object|Const|tuple_iterator)"):
        checked("aten.my.default", wrong)


@pytest.mark.row("A2")
def test_rules_may_return_trees() -> None:
    value = Value("x", DType.F32, (2,), (1,))
    tree = [value, ({"a": value, "b": [1, 2.5, None, True]},)]
    assert checked("aten.my.default", tree) is tree


@pytest.mark.row("A4")
def test_scalars_are_literals() -> None:
    seen = chk(lambda x: x * 3.5 + torch.full((), 2.0) + torch.tensor(0.25), torch.randn(40))
    assert (seen.K, seen.X) == (1, 0)
    assert "3.5f" in seen.code
    assert "2.0f" in seen.code
    (kernel,) = (n for n in seen.plan.graph.nodes if isinstance(n, Kernel))
    assert len(kernel.operands) <= 2  # x, and the constant tensor, which is an input
    dynamic = chk(lambda x: x + x.shape[0], torch.randn(6, 3), also=[(torch.randn(9, 3),)], dynamic=True)
    assert len(dynamic.graphs) == 1
    (kernel,) = (n for n in dynamic.plan.graph.nodes if isinstance(n, Kernel))
    (index,) = {e for root in expressions(kernel.body) for e in ex.walk(root) if isinstance(e, ex.Index)}
    assert len(index.expr.free_symbols) == 1


@pytest.fixture
def strides_op() -> Iterator[Any]:
    """A library op that gives the strides of its argument."""
    mine = torch.library.Library("dcompile_rows_a", "FRAGMENT")
    mine.define("strides(Tensor x) -> Tensor")
    mine.impl("strides", lambda x: torch.tensor(x.stride()), "CPU")
    torch.library.register_fake("dcompile_rows_a::strides", lambda x: torch.empty(x.dim(), dtype=torch.int64), lib=mine)
    yield torch.ops.dcompile_rows_a.strides
    mine._destroy()


@pytest.mark.row("A6")
def test_library_ops_see_the_strides_of_eager(strides_op: Any) -> None:
    image = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)

    def program(x: Tensor) -> list[Tensor]:
        return [strides_op(x), strides_op(x * 2), strides_op(x.transpose(1, 2)), strides_op((x + 1)[:, 1:])]

    seen = chk(program, image)
    assert seen.X == 4
    dynamic = chk(program, image, also=[(torch.randn(4, 3, 6, 7).to(memory_format=torch.channels_last),)], dynamic=True)
    assert len(dynamic.graphs) == 1


@pytest.mark.row("A7")
@pytest.mark.parametrize(("device", "multiprocessors"), [("cpu", 0), ("cuda", 132), ("meta", 0), ("", 0)])
def test_only_a_gpu_is_filled_by_cutting(device: str, multiprocessors: int) -> None:
    assert processor_of(device, context(132)).multiprocessors == multiprocessors
    assert CPU.threads == 0
