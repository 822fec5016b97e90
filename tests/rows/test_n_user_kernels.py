"""Row N6: Triton kernels of the user's own. Kernels are interpreted here, so that programs run without a GPU."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import Unsupported
from dcompile.ir.nodes import Extern
from dcompile.ir.symbolic import LAUNCH
from dcompile.lower import lower
from dcompile.lower.kernel_writes import written_parameters
from dcompile.options import Options
from dcompile.pipeline import compile_graph

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def add(a, b, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(a + at, mask=inside) + tl.load(b + at, mask=inside), mask=inside)


def through_names(a, b, where, total, n):  # type: ignore[no-untyped-def]
    target = where
    target += n
    row = target + tl.load(a)
    if n > 3:
        row = row + 1
    tl.store(row, tl.load(b))
    tl.atomic_add(total, 1.0)


def helper(pointer):  # type: ignore[no-untyped-def]
    return tl.load(pointer)


def calls_another(a, b, out):  # type: ignore[no-untyped-def]
    tl.store(out, helper(a) + tl.load(b))


def in_a_loop(a, b, n):  # type: ignore[no-untyped-def]
    p = a
    for _ in range(n):
        tl.store(p, 0.0)
        p, _ = b, p


def reads_only(a, b):  # type: ignore[no-untyped-def]
    tl.device_assert(tl.load(a) == tl.load(b))


WRITES: list[tuple[Any, set[str]]] = [
    (add, {"out", "BLOCK"}),
    (through_names, {"where", "total", "n"}),
    (calls_another, {"out", "a"}),
    (in_a_loop, {"a", "b"}),
    (reads_only, set()),
]


@pytest.mark.row("N6")
@pytest.mark.parametrize(("kernel", "written"), WRITES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_kernel_writes_is_read_from_its_source(kernel: Any, written: set[str]) -> None:
    """Too many parameters may be named (numbers that are part of a pointer), too few never."""
    assert written_parameters(triton.jit(kernel)) == written


@pytest.mark.row("N6")
def test_a_kernel_without_source_writes_everything() -> None:
    namespace: dict[str, Any] = {}
    exec("def hidden(a, b): pass", namespace)
    assert written_parameters(namespace["hidden"]) == {"a", "b"}


@pytest.mark.row("N6")
def test_an_autotuned_kernel_is_looked_through() -> None:
    tuned = triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"])
    assert written_parameters(tuned(triton.jit(add))) == {"out", "BLOCK"}


SIZE, BLOCK = 100, 64


def program(kernel: Any, device: str, launches: int = 1) -> fx.GraphModule:
    """``out = empty; kernel(x, y, out); return out * 2, x + 1`` as it is traced; launched again with the result."""
    graph = fx.Graph()
    with FakeTensorMode() as mode:

        def fake() -> Tensor:
            return FakeTensor(mode, torch.empty(SIZE, device="meta"), torch.device(device))

        x, y = graph.placeholder("x"), graph.placeholder("y")
        x.meta["val"], y.meta["val"] = fake(), fake()
        found: Any = x
        for _ in range(launches):
            out = graph.call_function(torch.ops.aten.empty.memory_format, ([SIZE],), {"device": torch.device(device)})
            call = graph.call_function(
                torch.ops.higher_order.triton_kernel_wrapper_functional,
                (),
                {
                    "kernel_idx": 0,
                    "constant_args_idx": 0,
                    "grid": [(-(-SIZE // BLOCK),)],
                    "tma_descriptor_metadata": {},
                    "kwargs": {"a": found, "b": y, "out": out},
                    "tensors_to_clone": ["a", "b", "out"],
                },
            )
            call.meta["dcompile_kernel"] = (kernel, {"n": SIZE, "BLOCK": BLOCK})
            call.meta["dcompile_source"] = "train.py:41"
            found = graph.call_function(operator.getitem, (call, "out"))
            out.meta["val"] = found.meta["val"] = fake()
            call.meta["val"] = {"a": fake(), "b": fake(), "out": fake()}
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (found, 2))
        more = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
        doubled.meta["val"], more.meta["val"] = fake(), fake()
        graph.output((doubled, more))
    return fx.GraphModule(torch.nn.Module(), graph)


def launches_of(graph: Any) -> list[Extern]:
    return [node for node in graph.nodes if isinstance(node, Extern) and node.op == LAUNCH]


@pytest.mark.row("N6")
def test_reads_after_the_launch_see_what_it_wrote() -> None:
    kernel = interpreter.InterpretedFunction(add)
    built = compile_graph(program(kernel, "cpu"), "inference0", Options(cache_dir=None))
    x, y = torch.randn(SIZE), torch.randn(SIZE)
    doubled, more = built.run([x, y])
    torch.testing.assert_close(doubled, (x + y) * 2)
    torch.testing.assert_close(more, x + 1)


@pytest.mark.row("N6")
def test_only_what_is_stored_to_is_written_and_nothing_is_copied() -> None:
    lowered = lower(program(interpreter.InterpretedFunction(add), "cpu"), "inference")
    (call,) = launches_of(lowered.graph)
    assert len(call.writes) == 1
    assert not {"x", "y"} & set(call.writes)
    assert sum("pointwise" in line for line in print_graph(lowered.graph).splitlines()) == 2
    assert parse_graph(print_graph(lowered.graph)) == lowered.graph


@pytest.mark.row("N6")
def test_one_kernel_launched_twice_is_held_once() -> None:
    kernel = interpreter.InterpretedFunction(add)
    gm = program(kernel, "cpu", launches=2)
    lowered = lower(gm, "inference")
    assert len(launches_of(lowered.graph)) == 2
    assert len(lowered.modules) == 1
    built = compile_graph(gm, "inference0", Options(cache_dir=None))
    assert built.host.count("rt.program(") == 1
    x, y = torch.randn(SIZE), torch.randn(SIZE)
    torch.testing.assert_close(built.run([x, y])[0], (x + y + y) * 2)


@pytest.mark.row("N6")
def test_a_kernel_on_cpu_tensors_is_an_error_with_the_line() -> None:
    with pytest.raises(Unsupported, match=r"train.py:41.*Triton kernel add on CPU.*move its tensors to a GPU"):
        lower(program(triton.jit(add), "cpu"), "inference")


@pytest.mark.row("N6")
def test_on_a_gpu_the_launch_is_a_node() -> None:
    lowered = lower(program(triton.jit(add), "cuda"), "inference")
    (call,) = launches_of(lowered.graph)
    assert [lowered.graph.value(name).device for name in call.writes] == ["cuda"]


class Recorder:
    """A tuned kernel that notes how it is launched."""

    arg_names = ("a", "n", "BLOCK")

    def __init__(self) -> None:
        self.configs = [triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})]
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((grid({"BLOCK": 64, "n": 7}), args, kwargs))


@pytest.mark.row("N6")
def test_each_configuration_of_a_tuned_kernel_has_its_grid() -> None:
    from dcompile.runtime.user_kernels import launch

    kernel = Recorder()
    launch((kernel, {"n": 7}), [(4,), (2,)], {"a": 1})
    assert kernel.calls == [((2,), (1, 7), {})]
