"""Arithmetic and bytes of nodes, against counts by hand and PyTorch's own flop counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcompile.analyse.flops import SOFTMAX_FLOPS, Work, work
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Literal, Ref
from dcompile.ir.types import DType, Value, contiguous_stride


def last(text: str) -> Work:
    graph = parse_graph(text)
    return work(graph.nodes[-1], graph)


def test_a_pointwise_node() -> None:
    line = "z: f32[8, 4] = pointwise (i0: 8, i1: 4) x[i0, i1] * y[i1] + x[i0, i1]"
    found = last(f"graph g(x: f32[8, 4], y: f32[4]) {{\n {line}\n return %z\n}}\n")
    assert (found.flops, found.nbytes) == (2 * 32, 4 * (32 + 4 + 32))


def test_a_gather_moves_only_the_rows_it_takes() -> None:
    found = last(
        """graph g(table: f32[1000, 4], idx: i64[3]) {
          z: f32[3, 4] = pointwise (i0: 3, i1: 4) table[q0, i1 | q0 = idx[i0]]
          return %z
        }"""
    )
    assert found.nbytes == 4 * 12 + 4 * 12 + 8 * 3


def test_a_reduction() -> None:
    found = last("graph g(x: f32[8, 4]) {\n z: f32[8] = reduce sum (i0: 8; r0: 4) x[i0, r0]\n return %z\n}\n")
    assert (found.flops, found.nbytes) == (32, 4 * (32 + 8))


def test_a_store_touches_what_it_writes_not_the_whole_target() -> None:
    text = "graph g(x: f32[100], y: f32[4]) {{\n x2: f32[100] = store {} x (i0: 4) [i0] = y[i0]\n return %x2\n}}\n"
    assert last(text.format("set")).nbytes == 4 * (4 + 4)
    assert last(text.format("add")).nbytes == 4 * (2 * 4 + 4)


def test_a_kernel_counts_iterations_and_each_buffer_once() -> None:
    found = last(
        """graph g(x: f32[8, 4]) {
          z: f32[8, 4] = kernel targets (_) {
            nest (parallel i0: 8) {
              fold (serial r0: 4) {
                acc = sum x[4*i0 + r0]
              }
              nest (simd i1: 4) {
                write z[4*i0 + i1] = x[4*i0 + i1] / acc
              }
            }
          }
          return %z
        }"""
    )
    assert (found.flops, found.nbytes) == (32 + 4 * 32, 4 * (32 + 32))


def test_symbolic_sizes_use_the_hint_and_broadcast_dimensions_are_counted_once() -> None:
    found = last(
        """graph g(x: f32[s0, 4]{0, 1}, s0: size = 10) {
          z: f32[s0, 4] = pointwise (i0: s0, i1: 4) x[i0, i1] + 1.0:f32
          return %z
        }"""
    )
    assert (found.flops, found.nbytes) == (40, 4 * (4 + 40))


def test_packing_costs_the_parts_that_cannot_be_placed() -> None:
    text = """graph g(x: f32[16]) {{
      a: f32[16] = pointwise (i0: 16) x[i0] + 1.0:f32
      {}
      f: f32[32] = pack ({})
      return %f
    }}"""
    assert last(text.format("", "a, x")).nbytes == 2 * 64
    assert last(text.format("", "a, a")).nbytes == 4 * 64
    used = text.format("b: f32[16] = pointwise (i0: 16) a[i0] + 1.0:f32", "a, b")
    assert last(used).nbytes == 2 * 64
    assert last(text.format("b: f32[16] = pointwise (i0: 16) x[i0] + 2.0:f32", "a, b")).nbytes == 0


def value(name: str, tensor: torch.Tensor) -> Value:
    dtype = DType.of(tensor.dtype)
    assert dtype is not None
    return Value(name, dtype, tuple(tensor.shape), contiguous_stride(tuple(tensor.shape)))


def library(op: Any, *args: Any) -> tuple[float, float]:
    """(our matmul flops, PyTorch's count) of one library call."""
    with FlopCounterMode(display=False) as counter:
        result = op(*args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    inputs = tuple(value(f"x{n}", t) for n, t in enumerate(tensors))
    names = iter(inputs)
    arguments = tuple(
        Ref(next(names).name) if isinstance(a, torch.Tensor) else tuple(a) if isinstance(a, list) else a for a in args
    )
    results = result if isinstance(result, tuple) else (result,)
    outs = tuple(value(f"o{n}", r) if isinstance(r, torch.Tensor) else None for n, r in enumerate(results))
    node = Extern(outs=outs, op=str(op), args=arguments, kwargs=(("layout", Literal("layout", "strided")),))
    graph = Graph("g", inputs, (node,), ())
    return work(node, graph).matmul_flops, counter.get_total_flops()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


aten = torch.ops.aten
CALLS = [
    (aten.mm.default, randn(5, 7), randn(7, 3)),
    (aten.addmm.default, randn(3), randn(5, 7), randn(7, 3)),
    (aten.bmm.default, randn(2, 5, 7), randn(2, 7, 3)),
    (aten.baddbmm.default, randn(2, 5, 3), randn(2, 5, 7), randn(2, 7, 3)),
    (aten.convolution.default, randn(2, 4, 9, 9), randn(6, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    (aten.convolution.default, randn(2, 4, 9, 9), randn(6, 2, 3, 3), None, [2, 2], [0, 0], [1, 1], False, [0, 0], 2),
    (aten.convolution.default, randn(2, 4, 9, 9), randn(4, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
    (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        randn(2, 3, 8, 16),
        randn(2, 3, 12, 16),
        randn(2, 3, 12, 16),
    ),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]}-{tuple(call[1].shape)}")
def test_library_arithmetic_agrees_with_pytorch(call: tuple[Any, ...]) -> None:
    ours, theirs = library(*call)
    if "for_cpu" in str(call[0]) and theirs == 0:  # PyTorch does not count this one in every release
        theirs = 2 * 2 * 2 * 3 * 8 * 12 * 16
    assert ours == theirs > 0


def test_attention_has_a_softmax_beside_its_products() -> None:
    call = "_scaled_dot_product_flash_attention_for_cpu.default(%q, %k, %v)"
    found = last(
        "graph g(q: f32[2, 3, 8, 16], k: f32[2, 3, 12, 16], v: f32[2, 3, 12, 16]) {\n"
        f" z: f32[2, 3, 8, 16] = extern aten.{call}\n return %z\n}}\n"
    )
    assert found.flops == SOFTMAX_FLOPS * 2 * 3 * 8 * 12
    assert found.matmul_flops == 2 * 2 * 2 * 3 * 8 * 12 * 16


def test_convolution_backward_is_two_convolutions() -> None:
    grad, data, weight = randn(2, 6, 9, 9), randn(2, 4, 9, 9), randn(6, 4, 3, 3)
    args = (grad, data, weight, [6], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    ours, theirs = library(aten.convolution_backward.default, *args, [True, True, False])
    assert ours == theirs > 0
    half, _ = library(aten.convolution_backward.default, *args, [False, True, False])
    assert 2 * half == ours


def test_other_library_calls_are_bytes() -> None:
    found = last("graph g(x: f32[8, 4]) {\n z: f32[8, 4] = extern aten.relu.default(%x)\n return %z\n}\n")
    assert (found.flops, found.matmul_flops, found.nbytes) == (0, 0, 256)
