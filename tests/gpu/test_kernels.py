"""Printed Triton kernels on a real GPU, through the cubins and the launcher that programs use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dcompile.codegen.triton import TritonSignature
from dcompile.errors import DCompileError
from dcompile.ir import expr as ex
from dcompile.reference import run_reference
from dcompile.runtime.triton_kernels import GpuKernels, compile_module
from tests.unit.codegen.kernels import F32, I0, I64, kernel_graph, pointwise, value
from tests.unit.codegen.triton_cases import CASES, Case, module_of, on_cuda, run_case

pytestmark = pytest.mark.gpu

CUDA_TOLERANCE = {"ops_f32": 2e-5, "randn": 5e-5}
"""CUDA's tan, lgamma and pow are a few units in the last place worse than the host's."""


def load(case: Case, folder: Path) -> GpuKernels:
    module = module_of(case)
    compile_module(module.source, module.signatures, folder)
    return GpuKernels(folder, "test")


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_equal_the_reference(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    gpu = load(case, tmp_path)
    stream = gpu.stream(torch.device("cuda", torch.cuda.current_device()))

    def execute(name: str, _: TritonSignature, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        gpu.functions[name](*(tensor.data_ptr() for tensor in buffers), *sizes, stream)

    got = run_case(case, execute, "cuda")
    torch.cuda.synchronize()
    gpu.check()
    want = run_reference([case.graph], [[x.clone() if isinstance(x, torch.Tensor) else x for x in case.inputs]])[0]
    tolerance = max(case.tolerance, CUDA_TOLERANCE.get(name, 0.0))
    for ref, a, b in zip(case.graph.outputs, got, want, strict=True):
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{ref}: {a} {b}")


def test_misaligned_buffers_run_a_version_of_their_own(tmp_path: Path) -> None:
    n = 4099
    graph = kernel_graph(
        [value("x", (n,))], pointwise((n,), ex.op("mul", ex.load("x", (I0,), F32), ex.const(3.0, F32)))
    )
    gpu = load(Case(on_cuda(graph), []), tmp_path)
    x, y = torch.randn(n + 1, device="cuda"), torch.empty(n + 1, device="cuda")
    (function,) = gpu.functions.values()
    function(x[1:].data_ptr(), y[1:].data_ptr(), gpu.stream(x.device))
    torch.testing.assert_close(y[1:], x[1:] * 3)


def test_an_index_out_of_range_is_raised_by_the_next_call(tmp_path: Path) -> None:
    at = ex.op("wrap_index", ex.load("at", (I0,), I64), ex.const(10, I64))
    kernel = pointwise((8,), ex.load("x", (ex.bound(0),), F32, (at,)))
    gpu = load(Case(on_cuda(kernel_graph([value("x", (10,)), value("at", (8,), I64)], kernel)), []), tmp_path)
    x, y = torch.randn(10, device="cuda"), torch.empty(8, device="cuda")
    (function,) = gpu.functions.values()
    at_gpu = torch.tensor([0, 1, -10, 9, 10, 3, 2, 1], device="cuda")
    stream = gpu.stream(x.device)
    names = {"x": x, "at": at_gpu, "y": y}
    order = (
        module_of(Case(on_cuda(kernel_graph([value("x", (10,)), value("at", (8,), I64)], kernel)), [])).calls[0].buffers
    )
    function(*(names[name].data_ptr() for name in order), stream)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="out of range"):
        gpu.stream(x.device)
    gpu.stream(x.device)


def test_a_program_stays_on_its_device(tmp_path: Path) -> None:
    graph = kernel_graph([value("x", (4,))], pointwise((4,), ex.op("neg", ex.load("x", (I0,), F32))))
    gpu = load(Case(on_cuda(graph), []), tmp_path)
    with pytest.raises(DCompileError, match="set_device"):
        gpu.stream(torch.device("cuda", torch.cuda.current_device() + 1))
