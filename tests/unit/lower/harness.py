"""Trace, lower, interpret, compare with eager: what every rule's test does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern
from dcompile.lower import Lowered, SizeOf, lower
from dcompile.reference import run_reference


def trace(function: Callable[..., Any], *args: Any, symbolic: bool = False, decompose: bool = False) -> fx.GraphModule:
    """The aten graph of ``function``; op by op as written, or functional and decomposed with ``decompose``."""
    table = core_aten_decompositions() if decompose else {}
    # torch's own decomposition of this forward does not give what the (undecomposed) backward kernel expects
    table.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, None)
    mode = "symbolic" if symbolic else "fake"
    leaves, spec = pytree.tree_flatten(args)
    tensors = flat_tensors(args)

    def flat(*given: Tensor) -> list[Any]:
        fresh = iter(given)
        filled = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_leaves(function(*pytree.tree_unflatten(filled, spec)))

    program = torch.func.functionalize(flat) if decompose else flat
    return make_fx(program, tracing_mode=mode, decomposition_table=table)(*tensors)


def flat_tensors(args: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]


def with_extra(lowered: Lowered, inputs: list[Tensor]) -> list[Tensor | int]:
    """The inputs a lowered program takes: its own, then sizes and constants it asks for."""
    extra = [inputs[e.input].shape[e.dim] if isinstance(e, SizeOf) else e for e in lowered.extra_inputs]
    return [*inputs, *extra]


def fallbacks(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if isinstance(node, Extern) and node.fallback]


def externs(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if isinstance(node, Extern)]


def interpret(lowered: Lowered, *args: Any) -> list[Any]:
    return run_reference([lowered.graph], [with_extra(lowered, [t.clone() for t in flat_tensors(args)])])[0]


def compare(got: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    """Equal values, dtypes, shapes and strides; NaN in the same places."""
    if not isinstance(expected, Tensor):
        assert got == expected
        return
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    if expected.numel() > 1:
        strided = [d for d, n in enumerate(expected.shape) if n != 1]
        assert [got.stride(d) for d in strided] == [expected.stride(d) for d in strided]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


def check(
    function: Callable[..., Any],
    *args: Any,
    symbolic: bool = False,
    decompose: bool = False,
    library: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> Graph:
    """``function`` lowered and interpreted equals eager; no fallback unless ``library``. Gives the graph."""
    lowered = lower(trace(function, *args, symbolic=symbolic, decompose=decompose), "inference")
    if not library:
        assert fallbacks(lowered.graph) == []
    expected = pytree.tree_leaves(function(*pytree.tree_map_only(Tensor, torch.clone, args)))
    for got, want in zip(interpret(lowered, *args), expected, strict=True):
        compare(got, want, rtol, atol)
    return lowered.graph
