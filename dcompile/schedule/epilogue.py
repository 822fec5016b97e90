"""With ``Options.freeze``: convolutions and linear layers as calls of oneDNN or MKL on packed weights, with what
follows them elementwise inside the same call.

Only for inference graphs on CPU in f32. A weight is packed at the first call and again when it changes
(``runtime.packed``). oneDNN's ``relu`` and clamps turn NaN into a number where PyTorch keeps it, which is why this is
an option. Calls with little work stay as they are: oneDNN's fixed costs are higher than MKL's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.analyse.flops import work
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import flatten_index, simplify, symbol, unflatten
from dcompile.ir.nodes import Arg, Extern, Node, Pointwise, Reduction, Ref, View
from dcompile.ir.types import DType, Origin, Size, Value, contiguous_stride
from dcompile.schedule.postop import Epilogue, Unary, match_epilogue

STAGE = "library_epilogues"
AFTER_BINARY = ("", "relu")
"""What oneDNN's calls can do after an operation with another tensor."""
MIN_FLOPS = 4e6
"""Microseconds on one AVX2 core, library call and relu against the fused call on a packed weight: linear 16x64x64
(0.1 Mflop) 8 against 30, 128x256x256 (17 Mflop) 417 against 253, 32x1024x4096 14600 against 9700; convolution of
1x3x32x32 to 16 channels (0.9 Mflop) 38 against 74, of 8x16x32x32 to 32 channels (75 Mflop) 2200 against 1100."""


def library_epilogues(graph: Graph, ctx: Context) -> Graph:
    """Rewrite what can be, each with a verdict."""
    if not ctx.options.freeze or graph.name != "inference" or not _has("mkldnn"):
        return graph
    return _Rewriter(graph, ctx).run()


@dataclass(frozen=True)
class _Found:
    """A library call that is replaced.

    Attributes:
        call: the call itself; its result is ``made``.
        reader: the last of the loops that become its epilogue, None for none.
        dropped: the other one.
    """

    call: Extern
    made: Value
    reader: Pointwise | None
    epilogue: Epilogue
    dropped: str | None = None


class _Rewriter:
    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.graph, self.ctx = graph, ctx
        self.views: dict[str, View] = {node.out.name: node for node in graph.nodes if isinstance(node, View)}
        self.roots = storage_roots(graph)
        self.names = set(graph.defs)
        self.laid_out: dict[str, Value] = {}
        self.taken: set[str] = set()

    def run(self) -> Graph:
        replaced: dict[int, list[Node]] = {}
        for position, node in enumerate(self.graph.nodes):
            if not isinstance(node, Extern) or position in replaced:
                continue
            found = self._found(node)
            nodes = None if found is None else self._call(found)
            if found is None or nodes is None:
                continue
            where = position if found.reader is None else self.graph.producer[found.reader.out.name]
            replaced[position] = []
            if found.reader is not None:
                self.taken.add(found.reader.out.name)
            if found.dropped is not None:
                replaced[self.graph.producer[found.dropped]] = []
            replaced[where] = list(nodes)
            ops = ", ".join(node.op for node in nodes if isinstance(node, Extern))
            self.ctx.verdict(STAGE, found.made.name, ops, "the weight is packed once")
        nodes_now: list[Node] = []
        for position, node in enumerate(self.graph.nodes):
            nodes_now.extend(replaced.get(position, [node]))
        return self.graph.with_nodes(tuple(nodes_now))

    def _found(self, node: Extern) -> _Found | None:
        if node.op not in ("aten.convolution.default", "aten.addmm.default", "aten.mm.default"):
            return None
        made = node.outs[0]
        if made is None or node.kwargs or made.device != "cpu" or made.dtype is not DType.F32:
            return None
        done = work(node, self.graph)
        if done.matmul_flops < MIN_FLOPS:
            self.ctx.verdict(STAGE, made.name, "as it is", f"{done.matmul_flops:.2g} flops are too few")
            return None
        reader, epilogue = self._reader(made)
        if reader is not None and epilogue.unary == Unary():
            then, unary = self._reader(reader.out)
            allowed = epilogue.other is None or unary.unary.name in AFTER_BINARY
            if then is not None and unary.other is None and allowed:
                return _Found(node, made, then, replace(epilogue, unary=unary.unary), reader.out.name)
        return _Found(node, made, reader, epilogue)

    def _reader(self, made: Value) -> tuple[Pointwise | None, Epilogue]:
        """The only reader of ``made`` if it is an epilogue."""
        nothing = None, Epilogue()
        users = self.graph.users[made.name]
        reader = self.graph.nodes[users[0]] if len(users) == 1 else None
        if made.name in self.graph.output_names or not isinstance(reader, Pointwise) or reader.out.name in self.taken:
            return nothing
        out = reader.out
        if out.dtype is not made.dtype or out.numel != made.numel or not self._same_places(reader, made):
            return nothing
        epilogue = match_epilogue(reader.expr, made.name)
        if epilogue is None or (epilogue.other is not None and epilogue.unary.name not in AFTER_BINARY):
            return nothing
        if epilogue.other is not None:
            other = self.graph.value(epilogue.other)
            if other.dtype is not made.dtype or other.numel != made.numel or other.stride != out.stride:
                return nothing
        return reader, epilogue

    def _same_places(self, reader: Pointwise, made: Value) -> bool:
        """Whether the loop reads and writes every element at the same place of dense memory."""
        ranges = dict(reader.axes)
        there = flatten_index(tuple(var for var, _ in reader.axes), reader.out.stride)
        there = simplify(there, ranges)
        return all(
            simplify(flatten_index(load.index, self.graph.value(load.buffer).stride), ranges) == there
            for load in ex.loads(reader.expr)
        ) and (reader.out.stride == made.stride or _both_dense(reader.out, made))

    def _call(self, found: _Found) -> tuple[Node, ...] | None:
        if found.call.op == "aten.convolution.default":
            return self._convolution(found)
        return self._linear(found)

    # convolutions

    def _convolution(self, found: _Found) -> tuple[Node, ...] | None:
        x, w, bias, stride, padding, dilation, transposed, out_padding, groups = found.call.args
        image, weight = self.graph.value(x.name), self.graph.value(w.name)
        spatial = len(image.shape) - 2
        if not self._packs(found.call):
            return None
        wide = [_spread(list_, spatial) for list_ in (padding, stride, dilation)]
        if transposed:
            if found.epilogue.other is not None:
                found = replace(found, reader=None, epilogue=Epilogue())
            window: tuple[Arg, ...] = (wide[0], _spread(out_padding, spatial), wide[1], wide[2], groups)
            kind, op = "convolution_transpose", "mkldnn._convolution_transpose_pointwise.default"
        else:
            window = (*wide, groups)
            kind, op = "convolution", "mkldnn._convolution_pointwise.default"
        pack, packed = self._pack(found, weight, kind, (*window, image.shape))
        return (pack, *self._finish(found, op, Ref(x.name), (Ref(packed.name), bias, *window)))

    def _pack(self, found: _Found, weight: Value, kind: str, args: tuple[Arg, ...]) -> tuple[Extern, Value]:
        packed = replace(weight, name=self._fresh(f"{weight.name}_packed"))
        call = Extern(
            outs=(packed,), op=f"dcompile.pack_{kind}", args=(Ref(weight.name), *args), origin=found.call.origin
        )
        return call, packed

    def _finish(self, found: _Found, op: str, x: Ref, args: tuple[Arg, ...]) -> tuple[Node, ...]:
        """The call with its epilogue, and a view where the loop's shape is another."""
        epilogue = found.epilogue
        out = found.made if found.reader is None else found.reader.out
        origin = found.call.origin if found.reader is None else found.call.origin | found.reader.origin
        unary = epilogue.unary
        convolution = "convolution" in op
        if epilogue.other is not None and found.reader is not None:
            other = Ref(epilogue.other)
            if convolution:
                binary = (epilogue.binary, epilogue.alpha, unary.name or None, unary.scalars, unary.algorithm or None)
                same = out.shape == found.made.shape
                if epilogue.binary == "add" and same and self._dies(epilogue.other, found.reader):
                    return self._accumulated(out, other.name, (other, x, *args, *binary), origin)
                call = (x, other, *args, *binary)
                return self._shaped(found, "mkldnn._convolution_pointwise.binary", call, out)
            shaped, view = self._as_made(other.name, found.made)
            nodes = self._shaped(found, "mkldnn._linear_pointwise.binary", (x, shaped, *args, epilogue.binary), out)
            return (*view, *nodes)
        return self._shaped(found, op, (x, *args, unary.name or "none", unary.scalars, unary.algorithm), out)

    def _shaped(self, found: _Found, op: str, args: tuple[Arg, ...], out: Value) -> tuple[Node, ...]:
        origin = found.call.origin if found.reader is None else found.call.origin | found.reader.origin
        if op.startswith("mkldnn._convolution"):
            return self._laid_out(out, op, args, origin)
        if out.shape == found.made.shape:
            return (Extern(outs=(out,), op=op, args=args, origin=origin),)
        flat = replace(found.made, name=self._fresh(f"{out.name}_flat"))
        assert found.reader is not None
        return (Extern(outs=(flat,), op=op, args=args, origin=origin), _reshaped(out, flat, found.reader))

    def _accumulated(self, out: Value, other: str, args: tuple[Arg, ...], origin: Origin) -> tuple[Node, ...]:
        """A convolution added to ``other``, in its memory."""
        there, copy = self._placed(out, self.laid_out.get(other, self.graph.value(other)).stride, origin)
        call = Extern(
            outs=(None,), op="mkldnn._convolution_pointwise_.binary", args=args, writes=(other,), versions=(there,),
            origin=origin,
        )  # fmt: skip
        return (call, *copy)

    def _laid_out(self, out: Value, op: str, args: tuple[Arg, ...], origin: Origin) -> tuple[Node, ...]:
        """A convolution, whose result lies channels last: the readers take it so, or it is copied."""
        there, copy = self._placed(out, _channels_last_stride(out.shape), origin)
        return (Extern(outs=(there,), op=op, args=args, origin=origin), *copy)

    def _placed(self, out: Value, stride: tuple[Size, ...], origin: Origin) -> tuple[Value, tuple[Node, ...]]:
        """``out`` with other strides, or another value with them that is copied into it."""
        there = replace(out, stride=stride)
        readers = [self.graph.nodes[user] for user in self.graph.users[out.name]]
        flexible = out.name not in self.graph.output_names and all(self._takes_any_layout(node) for node in readers)
        if flexible or out.stride == there.stride:
            self.laid_out[out.name] = there
            return there, ()
        there = replace(there, name=self._fresh(f"{out.name}_channels_last"))
        axes = tuple((symbol(f"i{n}"), size) for n, size in enumerate(out.shape))
        body = ex.load(there.name, tuple(var for var, _ in axes), out.dtype)
        return there, (Pointwise(out=out, axes=axes, expr=body, origin=origin),)

    def _takes_any_layout(self, node: Node) -> bool:
        """Whether ``node`` reads by position, or is a convolution that this pass packs as well."""
        if isinstance(node, Pointwise | Reduction):
            return True
        found = self._found(node) if isinstance(node, Extern) else None
        return found is not None and self._packs(found.call)

    def _packs(self, call: Extern) -> bool:
        """Whether a convolution is one of those that are replaced."""
        if call.op != "aten.convolution.default":
            return False
        image, weight = self.graph.value(call.args[0].name), self.graph.value(call.args[1].name)
        fixed = all(isinstance(n, int) for n in (*image.shape, *weight.shape))
        return fixed and len(image.shape) in (4, 5) and weight.name in self.graph.input_names

    def _as_made(self, name: str, made: Value) -> tuple[Ref, tuple[Node, ...]]:
        """An operand in the shape (rows, columns) of the product, by a view of its leading dimensions if need be."""
        value = self.graph.value(name)
        if value.shape == made.shape:
            return Ref(name), ()
        out = replace(made, name=self._fresh(f"{name}_flat"))
        axes = tuple((symbol(f"i{n}"), size) for n, size in enumerate(made.shape))
        index = (*unflatten(axes[0][0], value.shape[:-1]), axes[1][0])
        return Ref(out.name), (View(out=out, base=name, axes=axes, index=index),)

    def _dies(self, name: str, reader: Pointwise) -> bool:
        """Whether the memory of ``name`` is the program's own and nobody needs it after ``reader``."""
        root = self.roots[name]
        alike = [other for other, its in self.roots.items() if its == root]
        if root != name or root in self.graph.input_names or any(other in self.graph.output_names for other in alike):
            return False
        last = self.graph.producer[reader.out.name]
        maker = self.graph.nodes[self.graph.producer[name]]
        own = not isinstance(maker, Extern) or not maker.aliases
        return own and all(user <= last for other in alike for user in self.graph.users[other])

    # linear layers

    def _linear(self, found: _Found) -> tuple[Node, ...] | None:
        *bias, x, transposed = found.call.args
        view = self.views.get(transposed.name)
        if view is None or view.base not in self.graph.input_names:
            return None
        weight = self.graph.value(view.base)
        flipped = len(view.index) == 2 and tuple(view.index) == tuple(var for var, _ in reversed(view.axes))
        rows = self.graph.value(x.name).shape[0]
        usual = weight.stride == contiguous_stride(weight.shape) and found.made.stride == contiguous_stride(
            found.made.shape
        )
        if not flipped or not usual or not all(isinstance(n, int) for n in (*weight.shape, rows)):
            return None
        if bias and self.graph.value(bias[0].name).shape != weight.shape[:1]:
            return None
        epilogue = found.epilogue
        if epilogue.other is not None and (epilogue.unary.name or epilogue.alpha != 1):
            found, epilogue = replace(found, reader=None, epilogue=Epilogue()), Epilogue()
        offset = bias[0] if bias else None
        if epilogue == Epilogue() and _has("mkl"):
            pack, packed = self._pack(found, weight, "mkl_linear", (rows,))
            args = (x, Ref(packed.name), Ref(weight.name), offset, rows)
            return pack, Extern(outs=(found.made,), op="mkl._mkl_linear.default", args=args, origin=found.call.origin)
        pack, packed = self._pack(found, weight, "linear", (rows,))
        return (pack, *self._finish(found, "mkldnn._linear_pointwise.default", x, (Ref(packed.name), offset)))

    def _fresh(self, wish: str) -> str:
        name, number = wish, 0
        while name in self.names:
            number += 1
            name = f"{wish}_{number}"
        self.names.add(name)
        return name


def _has(library: str) -> bool:
    """Whether this torch was built with ``mkldnn`` or ``mkl``."""
    backend: Any = getattr(torch.backends, library)
    return bool(backend.is_available())


def _reshaped(out: Value, flat: Value, reader: Pointwise) -> View:
    index = unflatten(flatten_index(tuple(var for var, _ in reader.axes), out.stride), flat.shape)
    return View(out=out, base=flat.name, axes=reader.axes, index=tuple(simplify(i, dict(reader.axes)) for i in index))


def _both_dense(a: Value, b: Value) -> bool:
    return a.stride == contiguous_stride(a.shape) and b.stride == contiguous_stride(b.shape)


def _spread(entries: tuple[Arg, ...], count: int) -> tuple[Arg, ...]:
    """One entry for each spatial dimension."""
    return tuple(entries) * count if len(entries) == 1 else tuple(entries)


def _channels_last_stride(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Strides of an image whose channels are neighbours in memory."""
    stride: dict[int, Size] = {}
    step: Size = 1
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        stride[dim] = step
        step = step * shape[dim]
    return tuple(stride[dim] for dim in range(len(shape)))


__all__ = ["MIN_FLOPS", "library_epilogues"]
