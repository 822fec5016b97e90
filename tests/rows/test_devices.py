"""Rows N2 and B8: copies between devices are steps of the program. Read at text level: no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.analyse.verify import verify
from dcompile.capture.check import check
from dcompile.codegen.cpp import print_cpp
from dcompile.codegen.triton import print_triton
from dcompile.codegen.wrapper import print_host
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern
from dcompile.lower import Lowered, OnDevice, lower
from dcompile.options import Options
from dcompile.pipeline import Kernels, run_passes
from dcompile.plan import Plan
from dcompile.watch import Watch

aten = torch.ops.aten


class Program:
    """A traced program in the making. Copies to a device that is not here cannot be traced, only written down."""

    def __init__(self) -> None:
        self.root, self.graph, self.mode = torch.nn.Module(), fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)

    def input(self, name: str, device: str, *shape: int, channels_last: bool = False) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            value = torch.empty(shape, device=device)
            node.meta["val"] = value.contiguous(memory_format=torch.channels_last) if channels_last else value
        return node

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        setattr(self.root, name, tensor)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(tensor)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        actual = fx.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*actual, **kwargs)
        return node

    def move(self, x: fx.Node, device: str) -> fx.Node:
        node = self.graph.call_function(aten._to_copy.default, (x,), {"device": torch.device(device)})
        with self.mode:
            old = x.meta["val"]
            node.meta["val"] = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
        return node

    def lowered(self, *results: fx.Node) -> Lowered:
        self.graph.output(results)
        gm = fx.GraphModule(self.root, self.graph)
        check(gm)
        return lower(gm, "inference")


def planned(found: Lowered) -> tuple[Plan, str]:
    ctx = Context(Options.from_env({"cache_dir": None}), CostModel.analytical("cuda", 1))
    plan = run_passes(found.graph, ctx, Watch(ctx.options, "inference"))
    verify(plan)
    return plan, print_host(plan, Kernels({**print_cpp(plan.graph).calls, **print_triton(plan.graph).calls}))


def externs(plan: Plan) -> list[Extern]:
    return [node for node in plan.graph.nodes if isinstance(node, Extern)]


@pytest.mark.row("N2")
def test_a_copy_to_the_cpu_is_one_step() -> None:
    program = Program()
    x = program.input("x", "cuda", 4, 6)
    moved = program.move(program.call(aten.mul.Tensor, x, 2.0), "cpu")
    plan, host = planned(program.lowered(program.call(aten.add.Tensor, moved, 1.0)))
    (copy,) = externs(plan)
    assert (copy.op, copy.fallback) == ("aten._to_copy.default", False)
    kernels = [node for node in plan.graph.nodes if isinstance(node, Kernel)]
    assert [kernel.outs[0].device for kernel in kernels] == ["cuda", "cpu"]
    assert 'device=torch.device("cpu")' in host
    assert "stream = rt.stream(device_cuda)" in host


@pytest.mark.row("N2")
def test_a_copy_keeps_the_strides_eager_gives_it() -> None:
    program = Program()
    moved = program.move(program.input("x", "cpu", 2, 3, 4, 5, channels_last=True), "cuda")
    plan, _ = planned(program.lowered(moved, program.call(aten.relu.default, moved)))
    (copy,) = externs(plan)
    (out,) = copy.outs
    assert out is not None
    assert (out.device, out.stride) == ("cuda", (60, 1, 15, 3))


@pytest.mark.row("N2")
def test_a_copy_into_a_tensor_of_another_device_is_ordered_with_its_readers() -> None:
    program = Program()
    x, y = program.input("x", "cuda", 8), program.input("y", "cpu", 8)
    old = program.call(aten.sum.default, x)
    program.call(aten.copy_.default, x, y)
    plan, _ = planned(program.lowered(old, program.call(aten.mul.Tensor, x, 2.0)))
    assert [type(node).__name__ for node in plan.graph.nodes] == ["Kernel", "Extern", "Kernel"]
    (copy,) = externs(plan)
    assert copy.writes == ("x",)


@pytest.mark.row("N2", "B8")
def test_constants_are_made_where_they_are_used() -> None:
    program, table = Program(), torch.randn(5)
    x = program.input("x", "cuda", 5)
    ramp = program.move(program.call(aten.arange.default, 5, dtype=torch.float32, device=torch.device("cpu")), "cuda")
    fixed = program.move(program.call(aten.clone.default, program.constant("table", table)), "cuda")
    total = program.call(aten.add.Tensor, program.call(aten.add.Tensor, x, ramp), fixed)
    found = program.lowered(total)
    plan, _ = planned(found)
    assert not externs(plan)
    (moved,) = (extra for extra in found.extra_inputs if isinstance(extra, OnDevice))
    assert (moved.tensor is table, moved.device.type) == (True, "cuda")


@pytest.mark.row("B8", "I2")
def test_a_constant_is_copied_by_the_first_call_only() -> None:
    table = torch.randn(5)
    held = OnDevice(table, torch.empty(5, dtype=torch.float64))
    assert held.get() is held.get()
    torch.testing.assert_close(held.get(), table.double())


@pytest.mark.row("A7", "N2")
def test_kernels_are_printed_for_the_device_of_their_results() -> None:
    program = Program()
    results = [program.call(aten.exp.default, program.input(name, name, 8)) for name in ("cpu", "cuda")]
    plan, _ = planned(program.lowered(*results))
    cpp, gpu = print_cpp(plan.graph).calls, print_triton(plan.graph).calls
    assert len(cpp) == len(gpu) == 1
    assert not cpp.keys() & gpu.keys()
