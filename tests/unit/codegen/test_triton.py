"""Printed Triton kernels without a GPU: interpreted against the reference, compiled for Hopper, read as text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcompile.codegen.triton import print_triton
from dcompile.codegen.triton_launch import Launch, choose_launch
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.kernel import Kernel, Nest, Scratch, Write
from dcompile.ir.types import DType
from dcompile.runtime.triton_kernels import KERNELS, compile_module
from tests.unit.codegen.kernels import F32, I0, I1, R0, P, V, kernel_graph, pointwise, softmax, value
from tests.unit.codegen.triton_cases import (
    CASES,
    LAYER_NORM,
    STORED,
    fused_case,
    linear,
    module_of,
    on_cuda,
    product_case,
    softmax_case,
    split_scan_case,
)

pytest.importorskip("triton")

REPOSITORY = Path(__file__).parents[3]
HOPPER, AMPERE = 90, 80
MOST_REGISTERS = 255
COS_FRAME_BYTES = 32
"""libdevice's cos keeps a table of digits in local memory for huge arguments."""

GROUPS = 4
"""Processes the interpreted cases are divided among: each imports torch and Triton, as long as its cases take."""

FORMS = ("strips", "strips_flat", "channels_looped", "row_values",
         "softmax", "softmax_looped", "dynamic", "columns", "columns_looped", "argmax_f32", "any", "stored_looped",
         "full", "batch", "cumsum", "cummin_looped", "gather", "padded", "transposed_large",
         "transposed_batches", "atomic_f32", "randn", "to_bf16", "ops_bool")  # fmt: skip


@pytest.mark.row("E3", "N4")
@pytest.mark.parametrize("group", range(GROUPS))
def test_interpreted_kernels_equal_the_reference(group: int) -> None:
    names = list(CASES)[group::GROUPS]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    command = [sys.executable, "-m", "tests.unit.codegen.triton_interpret", *names]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_compiles_and_keeps_everything_in_registers(name: str, capability: int, tmp_path: Path) -> None:
    module = module_of(CASES[name]())
    compile_module(module.source, module.signatures, tmp_path, capability)
    for kernel in json.loads((tmp_path / KERNELS).read_text())["kernels"]:
        assert (tmp_path / f"{kernel['name']}.cubin").read_bytes().startswith(b"\x7fELF")
        assert 0 < kernel["registers"] <= MOST_REGISTERS
        assert kernel["frame_bytes"] == (COS_FRAME_BYTES if name == "randn" else 0)


LONG_SCANS = [
    ("sum", F32, (1, 1 << 22), "i1"),
    ("sum", DType.I64, (2, 1 << 21), "i1"),
    ("sum", DType.F64, (1, 100_003), "i1"),
    ("cummax", F32, (1, 1 << 20), "i1"),
    ("logaddexp", F32, (3, 1 << 20), "i1"),
    ("prod", F32, (1 << 16, 40), "i0"),
]


@pytest.mark.row("E3")
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize(("kind", "dtype", "shape", "along"), LONG_SCANS)
def test_long_scans_of_few_rows_are_cut_and_stay_in_registers(
    kind: str, dtype: DType, shape: tuple[int, int], along: str, capability: int, tmp_path: Path
) -> None:
    module = module_of(split_scan_case(kind, dtype, shape, along, length=None))
    compile_module(module.source, module.signatures, tmp_path, capability)
    clear, scan = json.loads((tmp_path / KERNELS).read_text())["kernels"]
    tiles = -(-max(shape) // scan["inner"])
    assert int(scan["programs"]) == tiles * (-(-min(shape) // scan["block"]))
    assert tiles > 16
    for kernel in (clear, scan):
        assert 0 < kernel["registers"] <= MOST_REGISTERS
        assert kernel["frame_bytes"] == 0


@pytest.mark.row("N4")
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize(("dtype", "tf32"), [("bf16", False), ("f32", True)])
def test_products_use_matrix_units_and_stay_in_registers(
    dtype: str, tf32: bool, capability: int, tmp_path: Path
) -> None:
    text = linear(4096, 3072, 768, dtype, right="{1, 768}")
    module = module_of(product_case(text, tf32=tf32))
    compile_module(module.source, module.signatures, tmp_path, capability)
    (kernel,) = json.loads((tmp_path / KERNELS).read_text())["kernels"]
    assert int(kernel["programs"]) == -(-4096 // kernel["block"]) * -(-3072 // kernel["inner"])
    assert kernel["block"] * kernel["inner"] >= 128 * 128
    assert 0 < kernel["registers"] <= MOST_REGISTERS
    assert kernel["frame_bytes"] == 0
    assert kernel["shared_bytes"] <= 227 * 1024


def test_a_spill_is_seen(tmp_path: Path) -> None:
    wide = Launch(block=1, inner=16384, persistent=True, num_warps=1)
    module = module_of(softmax_case(3, 16384, F32, wide))
    compile_module(module.source, module.signatures, tmp_path, HOPPER)
    (kernel,) = json.loads((tmp_path / KERNELS).read_text())["kernels"]
    assert kernel["frame_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ops_")])
def test_every_op_compiles_for_hopper(name: str, tmp_path: Path) -> None:
    module = module_of(CASES[name]())
    compile_module(module.source, module.signatures, tmp_path, HOPPER)
    assert len(list(tmp_path.glob("*.cubin"))) == len(module.signatures) > 0


def test_identical_kernels_are_printed_once() -> None:
    double = ex.op("mul", ex.load("x", (I0,), F32), ex.const(2.0, F32))
    graph = kernel_graph([value("x", (64,))], pointwise((64,), double, "y"), pointwise((64,), double, "z"))
    module = print_triton(on_cuda(graph))
    assert len(module.signatures) == 1
    assert module.calls[0].function == module.calls[1].function
    assert module.calls[0].buffers != module.calls[1].buffers


def test_a_batch_divides_its_programs_and_prints_equal_members_once() -> None:
    module = module_of(CASES["batch"]())
    (signature,) = module.signatures.values()
    text = module.source
    assert text.count("_part0(") == 1 + 2
    assert "_part4(" not in text
    assert text.count("program <") == 5
    assert int(signature.programs) == int(text.rsplit("program < ", 1)[1].split(":")[0])


def test_cpu_kernels_are_left_to_the_cpu_printer() -> None:
    graph = kernel_graph([value("x", (5, 7))], softmax(5, 7))
    assert print_triton(graph).source == ""


def test_a_short_row_stays_in_registers() -> None:
    text = body(module_of(fused_case(LAYER_NORM)).source)
    assert text.count("tl.load(b0") == 1
    assert "for " not in text
    assert "debug_barrier" not in text


def test_a_row_read_again_in_a_later_loop_is_behind_a_barrier() -> None:
    text = body(module_of(CASES["stored_looped"]()).source)
    store, barrier = text.index("tl.store("), text.index("tl.debug_barrier()")
    assert store < barrier < text.index("for ", barrier)
    assert "debug_barrier" not in body(module_of(fused_case(STORED)).source)


def test_addresses_are_64_bit_where_32_do_not_suffice() -> None:
    def copy(n: int) -> str:
        return body(
            print_triton(on_cuda(kernel_graph([value("x", (n,))], pointwise((n,), ex.load("x", (I0,), F32))))).source
        )

    assert "int64" not in copy(2**30)
    assert "int64" in copy(2**31)


def test_strided_addresses_beyond_32_bits_are_64_bit() -> None:
    load = ex.load("x", (I0 * 2**22,), F32)
    graph = kernel_graph([value("x", (1024, 2**22))], pointwise((1024,), load))
    assert "x.to(tl.int64) * 4194304" in body(print_triton(on_cuda(graph)).source)


def test_launches_fill_the_gpu_before_they_fill_a_program() -> None:
    few, many = (choose_launch(softmax(rows, 64), {}) for rows in (32, 100_000))
    assert few.block == 1
    assert many.block * many.inner == 2048
    assert not choose_launch(softmax(8, 100_000), {}).persistent
    assert choose_launch(softmax(8, 16_384), {}).persistent


def test_deeper_nests_are_refused() -> None:
    inner = Nest(((I1, 4),), (V,), (Write("y", I0 * 4 + I1, ex.load("x", (I0 * 4 + I1,), F32)),))
    kernel = Kernel(outs=(value("y", (8, 4)),), body=(Nest(((I0, 8),), (P,), (Nest(((R0, 1),), (V,), (inner,)),)),))
    with pytest.raises(CompilerBug, match="deeper"):
        print_triton(on_cuda(kernel_graph([value("x", (8, 4))], kernel)))


def test_bytes_are_not_added_atomically() -> None:
    write = Write("acc2", I0 * 0, ex.load("x", (I0,), DType.I8), mode="add")
    kernel = Kernel(outs=(value("acc2", (1,), DType.I8),), body=(Nest(((I0, 8),), (P,), (write,)),), targets=("acc",))
    graph = kernel_graph([value("x", (8,), DType.I8), value("acc", (1,), DType.I8)], kernel)
    with pytest.raises(CompilerBug, match="i8"):
        print_triton(on_cuda(graph))


def test_scratch_is_read_where_it_was_written() -> None:
    write = Write("m", I1, ex.load("x", (I1,), F32))
    read = Write("y", R0, ex.load("m", (R0 + 1,), F32))
    body = (Scratch("m", F32, 5), Nest(((I1, 4),), (V,), (write,)), Nest(((R0, 4),), (V,), (read,)))
    with pytest.raises(CompilerBug, match="another position"):
        print_triton(on_cuda(kernel_graph([value("x", (4,))], Kernel(outs=(value("y", (4,)),), body=body))))


def body(source: str) -> str:
    """The printed kernels without the helpers in front of them."""
    start = re.search(r"\ndef g0", source)
    assert start is not None
    return source[start.start() :]


def test_the_text_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    assert module_of(CASES["gather"]()).source == module_of(CASES["gather"]()).source


def test_masks_of_positions_that_blocks_fill_exactly_are_left_out() -> None:
    exact, ragged = (body(module_of(softmax_case(4, columns, F32)).source) for columns in (64, 65))
    assert "mask" not in exact
    assert "r_here" in ragged


def test_a_row_is_divided_by_one_reciprocal() -> None:
    text = body(module_of(softmax_case(4, 64, F32)).source)
    assert text.count("row_divisor(") == 1
    assert "div_rn" not in text
