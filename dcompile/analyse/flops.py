"""Arithmetic and memory traffic of nodes, at the size hints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.kernel import Fold, Kernel, Let, Nest, ScanLoop, Stmt, Write
from dcompile.ir.nodes import Axis, Extern, Node, Pack, Pointwise, Reduction, Ref, Scan, Store
from dcompile.ir.ops import PRODUCTS, WELFORD
from dcompile.ir.types import DType, Value

WELFORD_FLOPS = 4
"""Arithmetic of one element of mean and variance: a subtraction, an addition and a fused multiply-add."""


@dataclass
class Work:
    """What a node does.

    Attributes:
        flops: scalar arithmetic, by the weights of ``ops.OPS``.
        matmul_flops: multiply-adds of matrix units, two each.
        nbytes: bytes moved between memory and the processor, each buffer counted once.
        dtype: element type of the matrix arithmetic.
    """

    flops: float = 0.0
    matmul_flops: float = 0.0
    nbytes: float = 0.0
    dtype: DType = DType.F32


def work(node: Node, graph: Graph) -> Work:
    """The work of a loop node, kernel, pack or library call; none for views and collectives."""
    if isinstance(node, Kernel):
        return _Loops(graph).kernel(node)
    if isinstance(node, Pointwise | Reduction | Scan | Store):
        return _Loops(graph).loop(node)
    if isinstance(node, Pack):
        copied = (part for part in node.parts if not is_placed(part, node, graph))
        return Work(nbytes=2.0 * sum(dense_bytes(graph.value(part), graph) for part in copied))
    if isinstance(node, Extern):
        return _library(node, graph)
    return Work()


def dense_bytes(value: Value, graph: Graph) -> int:
    """Bytes of the elements of ``value``, gaps not counted, a broadcast dimension counted once."""
    nbytes = value.dtype.itemsize
    for size, step in zip(value.shape, value.stride, strict=True):
        if size == 0:
            return 0
        if step != 0:
            nbytes *= size if isinstance(size, int) else hint(size, graph.size_hints)
    return nbytes


def is_placed(part: str, pack: Pack, graph: Graph) -> bool:
    """Whether the memory planner is expected to place ``part`` inside the pack, so that packing it moves nothing:
    the part is made by a node of this graph and nobody but this pack reads it, once."""
    position = graph.producer.get(part)
    if position is None or part in graph.output_names or pack.parts.count(part) > 1:
        return False
    makes = isinstance(graph.nodes[position], Kernel | Pointwise | Reduction | Scan | Extern)
    return makes and len(graph.users[part]) == 1


class _Loops:
    """Counts loop nests: flops times iterations, and per buffer the elements touched, at most the whole buffer."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.hints = graph.size_hints
        self.flops = self.matmul_flops = 0.0
        self.dtype = DType.F32
        self.elements: dict[str, float] = {}

    def kernel(self, node: Kernel) -> Work:
        own = {out.name for out in node.outs}
        self.body(node.body, 1.0)
        values = {out.name: out for out in node.outs}
        for out, target in zip(node.outs, node.targets, strict=False):
            if target is not None:  # the target and its next version are one buffer
                self.elements[out.name] = self.elements.get(out.name, 0.0) + self.elements.pop(target, 0.0)
        operands = [name for name in node.operands if name not in own and name in self.elements]
        return self.total([*values.values(), *(self.graph.value(name) for name in operands)])

    def loop(self, node: Pointwise | Reduction | Scan | Store) -> Work:
        axes = node.axes + node.raxes if isinstance(node, Reduction) else node.axes
        times = self.times(axes)
        for root in node.exprs if isinstance(node, Reduction | Scan) else (node.expr,):
            self.expression(root, times)
        if isinstance(node, Reduction):
            self.flops += times * (WELFORD_FLOPS if node.kind in WELFORD else 1)
            for value in node.defs:
                self.touch(value.name, self.times(node.axes))
        elif isinstance(node, Scan):
            self.flops += times * sum(ex.flops(rule) for rule in node.combine)
            for value in node.outs:
                self.touch(value.name, times)
        elif isinstance(node, Store):
            for bound in node.bind:
                self.expression(bound, times)
            self.flops += times if node.mode == "add" else 0.0
            self.touch(node.out.name, times * (2 if node.mode == "add" else 1) + self.elements.pop(node.target, 0.0))
        else:
            self.touch(node.out.name, times)
        made = [value for value in node.defs if isinstance(value, Value)]
        return self.total([*made, *(self.graph.value(name) for name in node.operands if name in self.elements)])

    def total(self, values: Sequence[Value]) -> Work:
        nbytes = 0.0
        for value in values:
            whole = float(dense_bytes(value, self.graph))
            nbytes += min(whole, self.elements.get(value.name, 0.0) * value.dtype.itemsize)
        return Work(flops=self.flops, matmul_flops=self.matmul_flops, nbytes=nbytes, dtype=self.dtype)

    def body(self, body: tuple[Stmt, ...], times: float) -> None:
        for stmt in body:
            if isinstance(stmt, Nest):
                self.body(stmt.body, times * self.times(stmt.axes))
            elif isinstance(stmt, Let):
                self.expression(stmt.expr, times)
            elif isinstance(stmt, Write):
                self.write(stmt, times)
            elif isinstance(stmt, Fold):
                inner = times * self.times(stmt.axes)
                for accumulator in stmt.accumulators:
                    for root in accumulator.exprs:
                        self.expression(root, inner)
                    if accumulator.kind in PRODUCTS:
                        self.matmul_flops += 2 * inner
                        self.dtype = accumulator.expr.dtype
                        continue
                    self.flops += inner * (WELFORD_FLOPS if accumulator.kind in WELFORD else 1)
                self.body((*stmt.lets, *stmt.writes), inner)
            elif isinstance(stmt, ScanLoop):
                inner = times * self.times(stmt.axes)
                for root in stmt.exprs:
                    self.expression(root, inner)
                self.flops += inner * sum(ex.flops(rule) for rule in stmt.combine)
                self.body((*stmt.lets, *stmt.writes), inner)

    def write(self, stmt: Write, times: float) -> None:
        self.expression(stmt.expr, times)
        for bound in stmt.bind:
            self.expression(bound, times)
        self.touch(stmt.buffer, times * (2 if stmt.mode == "add" else 1))

    def expression(self, root: ex.Expr, times: float) -> None:
        self.flops += ex.flops(root) * times
        for load in ex.loads(root):
            self.touch(load.buffer, times)

    def touch(self, buffer: str, times: float) -> None:
        self.elements[buffer] = self.elements.get(buffer, 0.0) + times

    def times(self, axes: tuple[Axis, ...]) -> float:
        return float(prod(hint(size, self.hints) for _, size in axes))


def _library(node: Extern, graph: Graph) -> Work:
    """A library call: bytes of all distinct operands and results, and the arithmetic of the families that have any."""
    written = {v.name for v in node.versions}
    values = [graph.value(name) for name in node.operands]
    values += [out for out in node.defs if isinstance(out, Value) and out.name not in written]
    done = Work(nbytes=float(sum(dense_bytes(value, graph) for value in values)))
    family = _FAMILIES.get(op_name(node.op))
    if family is not None:
        done.matmul_flops = family(node, graph)
        done.flops = _softmax_flops(node, graph)
        inputs = _tensors(node, graph)
        done.dtype = inputs[-1].dtype if inputs else DType.F32
    return done


def op_name(op: str) -> str:
    """``"mm"`` of ``"aten.mm.default"``."""
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def _tensors(node: Extern, graph: Graph) -> list[Value]:
    return [graph.value(arg.name) for arg in node.args if isinstance(arg, Ref)]


def _numel(value: Value, graph: Graph) -> float:
    return float(hint(value.numel, graph.size_hints))


def _result(node: Extern) -> Value | None:
    return next((out for out in node.outs if out is not None), None)


def _matmul_flops(node: Extern, graph: Graph) -> float:
    """2 m n k: twice the inner size per element of the result. ``addmm`` and its like carry the addend first."""
    tensors, out = _tensors(node, graph), _result(node)
    if len(tensors) < 2 or out is None or not tensors[-2].shape:
        return 0.0
    return 2.0 * _numel(out, graph) * hint(tensors[-2].shape[-1], graph.size_hints)


def _linear_flops(node: Extern, graph: Graph) -> float:
    tensors, out = _tensors(node, graph), _result(node)
    if not tensors or out is None or not tensors[0].shape:
        return 0.0
    return 2.0 * _numel(out, graph) * hint(tensors[0].shape[-1], graph.size_hints)


def _convolution_flops(node: Extern, graph: Graph) -> float:
    """Twice the weights each output element meets; a transposed convolution spreads each input element instead."""
    tensors, out = _tensors(node, graph), _result(node)
    if len(tensors) < 2 or out is None:
        return 0.0
    data, weight = tensors[0], tensors[1]
    transposed = len(node.args) > 6 and node.args[6] is True
    meets = _numel(weight, graph) / max(hint(weight.shape[0], graph.size_hints), 1)
    return 2.0 * meets * (_numel(data, graph) if transposed else _numel(out, graph))


def _convolution_backward_flops(node: Extern, graph: Graph) -> float:
    """One forward's worth for the data gradient and one for the weight gradient, as far as ``output_mask`` asks."""
    tensors = _tensors(node, graph)
    if len(tensors) < 3:
        return 0.0
    grad, data, weight = tensors[:3]
    transposed = len(node.args) > 7 and node.args[7] is True
    meets = _numel(weight, graph) / max(hint(weight.shape[0], graph.size_hints), 1)
    mask = node.args[-1] if isinstance(node.args[-1], tuple) else (True, True)
    return 2.0 * meets * sum(map(bool, mask[:2])) * _numel(data if transposed else grad, graph)


def _attention_flops(node: Extern, graph: Graph) -> float:
    """Two products of batch x heads x queries x keys x width each; the causal half is not subtracted."""
    tensors = [t for t in _tensors(node, graph) if len(t.shape) == 4]
    return _attention(tensors[:3], graph, products=2.0)


def _attention_backward_flops(node: Extern, graph: Graph) -> float:
    """Five products: scores again, and the gradients of values, scores, queries and keys (Dao et al., NeurIPS 2022)."""
    tensors = [t for t in _tensors(node, graph) if len(t.shape) == 4]
    return _attention(tensors[1:4], graph, products=5.0)


def _attention(qkv: list[Value], graph: Graph, products: float) -> float:
    if len(qkv) < 3:
        return 0.0
    keys = hint(qkv[1].shape[2], graph.size_hints)
    return products * 2.0 * _numel(qkv[0], graph) * keys


SOFTMAX_FLOPS, SOFTMAX_BACKWARD_FLOPS = 10, 20
"""Scalar arithmetic of one score of an attention, in the weights of ``ops.OPS``: exponential, maximum, sum and scaling,
and in the backward pass all of that again. Measured on one idle core, four layers of 4 heads of 64 over 128 tokens, 16
sequences: what the library takes beyond its products is 9.9 and 19.6."""


def _softmax_flops(node: Extern, graph: Graph) -> float:
    """Of an attention forward or backward; 0 for other calls."""
    name = op_name(node.op)
    if "scaled_dot_product" not in name:
        return 0.0
    backward = name.endswith("_backward")
    qkv = [t for t in _tensors(node, graph) if len(t.shape) == 4][int(backward) :][:2]
    if len(qkv) < 2:
        return 0.0
    width = max(hint(qkv[0].shape[3], graph.size_hints), 1)
    scores = _numel(qkv[0], graph) / width * hint(qkv[1].shape[2], graph.size_hints)
    return scores * (SOFTMAX_BACKWARD_FLOPS if backward else SOFTMAX_FLOPS)


Family = Callable[[Extern, Graph], float]

_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "matmul", "addbmm"), _matmul_flops),
    "_int_mm": _matmul_flops,
    "linear": _linear_flops,
    "convolution": _convolution_flops,
    "convolution_backward": _convolution_backward_flops,
    "_scaled_dot_product_flash_attention": _attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "_scaled_dot_product_efficient_attention": _attention_flops,
    "_scaled_dot_product_cudnn_attention": _attention_flops,
    "_scaled_dot_product_flash_attention_backward": _attention_backward_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward_flops,
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward_flops,
}
"""Library calls whose time is arithmetic, by op name; all others are counted by their bytes."""


__all__ = ["Work", "dense_bytes", "is_placed", "op_name", "work"]
