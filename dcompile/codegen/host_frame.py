"""The frame of a host program: heading, inputs, arena, error handling and return around steps a subclass prints."""

from __future__ import annotations

from functools import cached_property

import sympy

from dcompile.codegen.host_memory import HostMemory
from dcompile.codegen.host_text import arg_text, dtype_text, sizes_text, tuple_text
from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import CompilerBug
from dcompile.ir.graph import SizeInput
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Ref
from dcompile.ir.types import Value
from dcompile.plan import PARTS, Home, Plan

RESERVED = frozenset({"rt", "torch", "call", "views", "arena", "block", "inputs", "result", "first", "rc", "threads"})
RESERVED |= {"clock", "alias", "fits", "start", "wait", "stream", "empty_strided", "LAYOUTS", "SHAPES", "STEPS"}
RESERVED |= {"shapes", "cpu", "cuda", "device_cuda", "max", "min", "float", "_"}
"""Identifiers that host programs use themselves."""


class HostFrame(HostMemory):
    """A host program without its steps.

    Attributes:
        timeline: the program records the times of its steps.
        bound: global variable of each kernel and library function, by how ``rt`` finds it.
        starts, handles: launch and work-handle variable of each pending collective.
        steps: (name, lane) of each recorded step.
        input_ends: last position that uses each input which the program may drop early (-1: none uses it).
    """

    def __init__(self, plan: Plan, name: str, timeline: bool) -> None:
        super().__init__(plan, name, RESERVED | set(plan.arena_bytes))
        self.timeline = timeline
        self.bound: dict[tuple[str, str], str] = {}
        self.starts = {node.pending.name: node for node in self.graph.nodes if isinstance(node, Start)}
        self.handles = {pending: self.var.fresh(pending) for pending in self.starts}
        self.steps: list[tuple[str, str]] = []
        self.devices = sorted({storage.device for storage in plan.storages.values()})
        self.input_ends = self._input_ends()

    def step(self, position: int, node: Node) -> None:
        """Print one node."""
        raise CompilerBug(f"{type(self).__name__} prints no steps")

    def program(self) -> str:
        """The source text."""
        self._inputs()
        for position, node in enumerate(self.graph.nodes):
            self.step(position, node)
        self._return()
        body = self.lines
        arena = bool(self._arena_bytes() or self.arena_tensors)
        guarded = arena or bool(self.starts)
        entry, self.lines = self.lines[: self.entry], []
        text = [*self._heading(), "", "", "def call(inputs):", *_indent(entry)]
        text += _indent(self._prologue(arena))
        if not guarded:
            return "\n".join([*text, *_indent(body[self.entry :]), *_indent(self._epilogue(False)), ""])
        handles = tuple_text(list(self.handles.values())) if self.handles else "()"
        text += ["    try:", *_indent(body[self.entry :], 2), "    except BaseException:"]
        text += [f"        rt.abandon({'arena, block' if arena else 'None, None'}, {handles})", "        raise"]
        return "\n".join([*text, *_indent(self._epilogue(arena)), ""])

    def bind(self, kind: str, target: str) -> str:
        """A global variable for a kernel or library function."""
        if (kind, target) not in self.bound:
            wish = target if kind in ("kernel", "program") else target.split(".", 1)[1].removesuffix(".default")
            self.bound[kind, target] = self.var.fresh(wish)
        return self.bound[kind, target]

    def _arena_bytes(self) -> dict[str, int]:
        return {name: nbytes for name, nbytes in self.plan.arena_bytes.items() if nbytes}

    def _heading(self) -> list[str]:
        """Doc line, bound functions, input layouts and arena."""
        arena = ", ".join(f"{nbytes} bytes of {name} arena" for name, nbytes in self._arena_bytes().items())
        lines = [f'"""Host program {self.name}: {len(self.graph.nodes)} steps, {arena or "no arena"}."""', ""]
        if (prediction := self.plan.prediction) is not None:
            lines += [
                f"# predicted: {prediction.makespan_us:.1f} us; program order {prediction.program_order_us:.1f} us; "
                f"no order is faster than {prediction.lower_bound_us:.1f} us",
            ]
        lines += ["import torch", "from torch import empty_strided", "", "alias, fits = rt.alias, rt.fits"]
        if self.starts:
            lines.append("start, wait = rt.comm.start, rt.comm.wait")
        for (kind, target), variable in self.bound.items():
            lines.append(f"{variable} = rt.{kind}({target!r})")
        lines.append("LAYOUTS = (")
        for value in self._tensor_inputs():
            lines.append(f"    {self._layout(value)},")
        lines.append(")")
        if not self._is_dynamic():
            lines.append(f"SHAPES = {self._shapes()}")
        if self.timeline:
            lines += ["STEPS = (", *(f"    ({step!r}, {lane!r})," for step, lane in self.steps), ")"]
        return lines + self._arena_lines()

    def _arena_lines(self) -> list[str]:
        if not (self._arena_bytes() or self.arena_tensors):
            return []
        lines = ["", "", "def views(block):", "    return ("]
        lines += [f"        {made},  # {variable}" for variable, made in self.arena_tensors.values()]
        nbytes = {name: self.plan.arena_bytes.get(name, 0) for name in self._arenas()}
        shared = {s.arena: s.group for s in self.plan.storages.values() if s.home is Home.SHARED}
        more = f", {dict(sorted(shared.items()))!r}" if shared else ""
        return [*lines, "    )", "", "", f"arena = rt.arena({nbytes!r}, views{more})"]

    def _arenas(self) -> dict[str, str]:
        """The device type of each arena, by its name."""
        used = {place.arena: place.device for place in self.places.values() if place.anchor is None}
        blocks = self._arena_bytes()
        used |= {s.arena: s.device for s in self.plan.storages.values() if s.home in PARTS and s.arena in blocks}
        return dict(sorted(used.items()))

    def _layout(self, value: Value) -> str:
        written = value.name in self._exposed_inputs
        option = ", written=True" if written else ", library=True" if self._is_for_library(value) else ""
        device = "any" if self._is_seed(value) else value.device
        return f"rt.Layout({value.name!r}, {dtype_text(value.dtype)}, {device!r}{option})"

    def _is_for_library(self, value: Value) -> bool:
        """Whether only library calls read an input."""
        readers = self._readers(value)
        return bool(readers) and all(isinstance(node, Extern) for node in readers)

    def _is_seed(self, value: Value) -> bool:
        """A CUDA integer that only library calls read: it may really lie on the CPU (``runtime.inputs.ANY_DEVICE``)."""
        if value.device == "cpu" or value.shape != () or not value.dtype.is_int:
            return False
        return all(isinstance(node, Extern) for node in self._readers(value))

    def _readers(self, value: Value) -> list[Node]:
        return [self.graph.nodes[position] for position in self.graph.users[value.name]]

    @cached_property
    def _exposed_inputs(self) -> frozenset[str]:
        """Inputs whose memory the program writes or returns: a copy would not do."""
        anchors = {self.places[name].anchor for node in self.graph.nodes for name in node.mutates}
        anchors |= {self.places[name].anchor for name in self.graph.output_names}
        aliased = {a for node in self.graph.nodes if isinstance(node, Extern) for a in node.aliases if a}
        anchors |= {self.places[name].anchor for name in aliased}
        return frozenset(a for a in anchors if a in self.graph.input_names)

    def _tensor_inputs(self) -> list[Value]:
        return [item for item in self.graph.inputs if isinstance(item, Value)]

    def _is_dynamic(self) -> bool:
        return any(isinstance(item, SizeInput) for item in self.graph.inputs) or any(
            isinstance(size, sympy.Expr) for value in self._tensor_inputs() for size in (*value.shape, *value.stride)
        )

    def _shapes(self) -> str:
        return tuple_text(
            [
                f"({sizes_text(v.shape, self.symbols)}, {sizes_text(v.stride, self.symbols)})"
                for v in self._tensor_inputs()
            ]
        )

    def _inputs(self) -> None:
        """Unpack, bind sizes, check layouts."""
        names = []
        for item in self.graph.inputs:
            if isinstance(item, SizeInput):
                names.append(self.symbols.setdefault(item.symbol, self.var.fresh(item.symbol.name)))
            else:
                names.append(self.var(item.name))
                self.hold(item.name, names[-1], self.places[item.name])
        if names:
            self.say(f"{tuple_text(names).removeprefix('(').removesuffix(')')} = inputs")
        self.say("inputs.clear()")
        for value in self._tensor_inputs():
            self.bind_sizes(value, self.var(value.name))
        tensors = tuple_text([self.var(value.name) for value in self._tensor_inputs()])
        shapes = "SHAPES"
        if self._is_dynamic():
            self.say(f"shapes = {self._shapes()}")
            shapes = "shapes"
        self.size_key = tuple_text(list(self.symbols.values())) if self.symbols else "()"
        self.say(f"first = rt.first({tensors}, LAYOUTS, {shapes}, {self.size_key})")
        if self._tensor_inputs():
            self.say(f"if not fits({tensors}, LAYOUTS, {shapes}):")
            self.say(f"    {tensors} = rt.conform({tensors}, LAYOUTS, {shapes})")
        for device in self.devices:
            if device != "cpu":
                self.say(f"device_{device} = {self._device_source(device)}")
        self.entry = len(self.lines)
        for value in self._tensor_inputs():
            if self.input_ends.get(value.name) == -1:
                self.forget([value.name])

    def bind_sizes(self, value: Value, variable: str) -> None:
        """Sizes that only this tensor's shape tells."""
        for axis, size in enumerate(value.shape):
            if isinstance(size, sympy.Symbol) and size not in self.symbols:
                self.symbols[size] = self.var.fresh(size.name)
                self.say(f"{self.symbols[size]} = {variable}.shape[{axis}]")

    def _device_source(self, device: str) -> str:
        for value in self._tensor_inputs():
            if value.device == device:
                return f"{self.var(value.name)}.device"
        return f'torch.device("{device}", torch.{device}.current_device())'

    def _prologue(self, arena: bool) -> list[str]:
        lines = []
        kernels = {out.device for node in self.graph.nodes if isinstance(node, Kernel) for out in node.outs}
        if "cpu" in kernels:
            lines.append("threads = rt.threads()")
        lines += [f"stream = rt.stream(device_{device})" for device in sorted(kernels - {"cpu"})]
        if self.timeline:
            lines.append("clock = rt.clock(STEPS)")
        if self.handles:
            lines.append(f"{' = '.join(self.handles.values())} = None")
        if arena:
            others = [f"device_{device}" for device in sorted(set(self._arenas().values())) if device != "cpu"]
            lines.append(f"block = arena.take({', '.join(others)})")
            lines += [f'{name} = block.base["{name}"]' for name in self._arenas()]
            if self.arena_tensors:
                variables = [variable for variable, _ in self.arena_tensors.values()]
                lines.append(f"{tuple_text(variables)} = block.tensors")
        return lines

    def _epilogue(self, arena: bool) -> list[str]:
        lines = ["if first:", f"    rt.checked({self.size_key})"]
        return [*(["arena.give(block)"] if arena else []), *lines, "return result"]

    def _return(self) -> None:
        parts = []
        outputs: tuple[object, ...] = self.graph.outputs
        for out in outputs:
            if not isinstance(out, Ref):
                parts.append(arg_text(out, self.symbols, self.tensor, self.device))
                continue
            place = self.places[out.name]
            if place.anchor is None:
                raise CompilerBug(f"{self.name}: output {out.name} lies in the arena, which the next call overwrites")
            parts.append(self.tensor(out.name) + (".item()" if out.item else ""))
        self.say(f"result = [{', '.join(parts)}]")

    def _input_ends(self) -> dict[str, int]:
        """Last position that touches each input's memory (-1: none); inputs that are returned are absent."""
        ends = {value.name: -1 for value in self._tensor_inputs()}
        for position, node in enumerate(self.graph.nodes):
            touched = [*node.operands, *(d.name for d in node.defs)]
            if isinstance(node, Wait):
                touched += self.starts[node.pending].sources
            for name in touched:
                anchor = self.places[name].anchor if name in self.places else None
                if anchor in ends:
                    ends[anchor] = position
        exposed = {self.places[name].anchor for name in self.graph.output_names}
        aliased = {a for node in self.graph.nodes if isinstance(node, Extern) for a in node.aliases if a}
        exposed |= {self.places[name].anchor for name in aliased}
        return {name: end for name, end in ends.items() if name not in exposed}


def _indent(lines: list[str], levels: int = 1) -> list[str]:
    return ["    " * levels + line for line in lines]
