"""Prints the host program: readable, straight-line Python, one line a step, that allocates, launches, calls and waits.

The text refers to one name it does not define: ``rt``, the ``runtime.program.Runtime`` it is loaded with. Arena
addresses are printed as ``cpu + offset``; tensors over arena memory are made once for each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import sympy
import torch

from dcompile.codegen import collective
from dcompile.codegen.host_frame import HostFrame
from dcompile.codegen.host_text import arg_text, dtype_text, size_text, sizes_text, tuple_text, where_text
from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import CompilerBug
from dcompile.ir.index import as_size, product, symbol
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Pack, View, calls_programs
from dcompile.ir.symbolic import MEASURED, find
from dcompile.ir.types import Number, Value, contiguous_stride
from dcompile.plan import Plan

SEEDS = "dcompile.seeds"


class CallSite(Protocol):
    """A kernel launch: the function and what it is called with, in parameter order."""

    @property
    def function(self) -> str: ...

    @property
    def buffers(self) -> tuple[str, ...]: ...

    @property
    def sizes(self) -> tuple[sympy.Symbol, ...]: ...


class Module(Protocol):
    """The compiled kernels of a plan: the launch of each Kernel node, by position."""

    @property
    def calls(self) -> Mapping[int, CallSite]: ...


def print_host(
    plan: Plan, module: Module, name: str | None = None, timeline: bool = False, asserts: bool = True
) -> str:
    """Python source of the host program of ``plan``; it defines ``call(inputs: list) -> list``.

    Args:
        module: the kernels, by node position.
        name: of the program in its heading; the graph's name if None.
        timeline: record start and end of every step.
        asserts: check the layout of what library calls return in the first call.

    Raises:
        CompilerBug: the plan contains a node that is no step, or a tensor without a place.
    """
    return _Printer(plan, module, name or plan.graph.name, timeline, asserts).program()


class _Printer(HostFrame):
    """Prints the steps."""

    def __init__(self, plan: Plan, module: Module, name: str, timeline: bool, asserts: bool) -> None:
        super().__init__(plan, name, timeline)
        self.module, self.asserts = module, asserts
        self.told: dict[tuple[int, int], str] = {}
        self.pointer_uses = self._count_pointer_uses()
        intervals = plan.prediction.intervals if plan.prediction else ()
        self.predicted_us = {interval.position: interval.end_us - interval.start_us for interval in intervals}

    def step(self, position: int, node: Node) -> None:
        before = len(self.lines)
        if isinstance(node, Kernel):
            self._kernel(position, node)
        elif isinstance(node, Extern):
            self._extern(position, node)
        elif isinstance(node, Pack):
            self._pack(position, node)
        elif isinstance(node, Start):
            self._start(position, node)
        elif isinstance(node, Wait):
            self.say(collective.wait_text(self.handles[node.pending]), self._comment(position, node))
        elif not isinstance(node, View):
            raise CompilerBug(f"{self.name}: a {type(node).__name__} is no step of a finished plan")
        if self.timeline and len(self.lines) > before:
            self._tick(node)
        self._free(position)

    def _kernel(self, position: int, node: Kernel) -> None:
        for out in node.outs:
            self.allocate(out.name)
        if all(out.numel == 0 for out in node.outs):
            return
        site = self.module.calls.get(position)
        if site is None:
            raise CompilerBug(f"{self.name}: no compiled function for the kernel at position {position}")
        function = self.bind("kernel", site.function)
        arguments = [self.pointer(name) for name in site.buffers]
        arguments += [size_text(size, self.symbols) for size in site.sizes]
        if any(out.device != "cpu" for out in node.outs):  # launches return at once; faults show at the next call
            self.say(f"{function}({', '.join([*arguments, 'stream'])})", self._comment(position, node))
            return
        where = where_text(node.origin) or site.function
        self.say(f"if rc := {function}({', '.join([*arguments, 'threads'])}):", self._comment(position, node))
        self.say(f"    rt.fault(rc, {where!r})")

    def _extern(self, position: int, node: Extern) -> None:
        planned = [out for out in node.outs if out is not None] if node.out_op else []
        for out in planned:
            self.allocate(out.name)
        program = self._program if calls_programs(node) else None
        values = [*node.args, *(arg for _, arg in node.kwargs)]
        arguments = [arg_text(arg, self.symbols, self.tensor, self.device, program) for arg in values]
        keys = [*([""] * len(node.args)), *(f"{key}=" for key, _ in node.kwargs)]
        arguments = [f"{key}{text}" for key, text in zip(keys, arguments, strict=True)]
        arguments += self._default_device(node)
        comment = self._comment(position, node)
        if node.out_op is not None:
            names = _out_arguments(node.out_op, len(planned))
            arguments += [f"{key}={self.tensor(out.name)}" for key, out in zip(names, planned, strict=True)]
            self.say(f"{self.bind('op', node.out_op)}({', '.join(arguments)})", comment)
            for out in planned:
                self._expect(node, out, self.tensor(out.name), address=self.pointer(out.name))
            return
        results = self._result_variables(position, node)
        call = f"{self.bind('op', node.op)}({', '.join(arguments)})"
        call = f"rt.leaves({call})" if node.nested else call
        self.say(f"{results} = {call}" if results else call, comment)
        for at, promised in node.promises:
            wanted = arg_text(promised, self.symbols, self.tensor, self.device)
            self.say(f"rt.check_number({self.told[position, at]}, {wanted}, {_call_text(node)!r})")
        for number in node.binds:
            self._learn(number, node)
        for result in node.outs:
            if result is not None:
                self._settle(node, result)
        for name in node.writes:
            self.moved(name)

    def _result_variables(self, position: int, node: Extern) -> str:
        told = {number.at: self._number(number.name) for number in node.binds if number.at is not None}
        for at, _ in node.promises:
            told[at] = self.told[position, at] = self.var.fresh("number")
        if not told and not any(out is not None for out in node.outs):
            return ""
        names = [self.var(out.name) if out is not None else told.get(n, "_") for n, out in enumerate(node.outs)]
        return tuple_text(names) if node.seq or len(names) > 1 else names[0]

    def _program(self, name: str) -> str:
        """The global variable of a program this one calls."""
        return self.bind("program", name)

    def _number(self, name: str) -> str:
        """The variable of a number that a call tells."""
        return self.symbols.setdefault(symbol(name), self.var.fresh(name))

    def _learn(self, number: Number, node: Extern) -> None:
        """Read ``number`` from what ``node`` returned.

        Raises:
            CompilerBug: it cannot be found there.
        """
        source = find(number, node)
        if source is None:
            raise CompilerBug(f"{self.name}: {node.op} at {node.origin.source} does not tell {number.name}")
        if source.out is None:
            variable = self._number(number.name)
            self.say(f"{variable} = int({variable})")
            return
        measured = f"{self.var(source.out.name)}.{source.kind}({source.dim})"
        text = size_text(source.solved, {**self.symbols, MEASURED: measured})
        self.say(f"{self._number(number.name)} = {text}")

    def _settle(self, node: Extern, out: Value) -> None:
        """An allocating call has returned ``out``: check it, and copy it if the plan wants it elsewhere."""
        variable, place = self.var(out.name), self.places[out.name]
        self.bind_sizes(out, variable)
        self._expect(node, out, variable)
        if place.anchor == out.name and place.offset == 0:
            self.hold(out.name, variable, place)
            return
        self.allocate(out.name)
        self.say(f"{self.tensor(out.name)}.copy_({variable})")
        self.say(f"del {variable}")

    def _expect(self, node: Extern, out: Value, variable: str, address: str | None = None) -> None:
        if not self.asserts:
            return
        call = _call_text(node)
        shape, stride = sizes_text(out.shape, self.symbols), sizes_text(self.places[out.name].stride, self.symbols)
        parts = [variable, dtype_text(out.dtype), shape, stride, repr(call), *([address] if address else [])]
        learning = bool(node.binds)  # its sizes differ from call to call: looked at in every one
        if not learning:
            self.say("if first:")
        self.say(f"{'' if learning else '    '}rt.expect({', '.join(parts)})")

    def _pack(self, position: int, node: Pack) -> None:
        self.allocate(node.out.name)
        whole = self.places[node.out.name]
        offset = whole.offset
        for part in node.parts:
            place = self.places[part]
            stride = contiguous_stride(place.shape)
            target = replace(whole, offset=offset, dtype=place.dtype, shape=place.shape, stride=stride)
            there = (place.anchor, place.arena, place.offset) == (whole.anchor, whole.arena, offset)
            if not there and product(place.shape) != 0:
                text = f"{self.tensor_at(target, f'{node.out.name}_{part}')}.copy_({self.tensor(part)})"
                self.say(text, self._comment(position, node))
            offset = as_size(offset + product(place.shape) * place.dtype.itemsize)

    def _start(self, position: int, node: Start) -> None:
        if not node.pending.in_place:
            for value in node.pending.results:
                self.allocate(value.name)
        sizes = partial(sizes_text, names=self.symbols)
        text = collective.start_text(node, self.handles[node.pending.name], self.tensor, sizes)
        self.say(text, self._comment(position, node))

    def _tick(self, node: Node) -> None:
        lane = "wait" if isinstance(node, Wait) else "compute"
        label = node.defs[0].name if node.defs else type(node).__name__
        if isinstance(node, Start):
            handle = self.handles[node.pending.name]
            name = collective.describe(node)
            self.say(f"clock.watch({node.group.label!r}, {name!r}, {handle}.when_done)")
        self.say(f"clock.tick({len(self.steps)})")
        self.steps.append((f"{label} {where_text(node.origin)}".strip(), lane))

    def _comment(self, position: int, node: Node) -> str:
        text = where_text(node.origin)
        if isinstance(node, Start):
            text = f"{node.group.size} ranks {text}"
        if position in self.predicted_us:
            text += f"  {self.predicted_us[position]:.1f} us"
        return text.strip()

    def _default_device(self, node: Extern) -> list[str]:
        """Seeds come from the default generator of the device that uses them."""
        out = node.outs[0] if node.outs else None
        if node.op != SEEDS or out is None or out.device == "cpu" or any(key == "device" for key, _ in node.kwargs):
            return []
        return [f"device={self.device(out.device)}"]

    def _count_pointer_uses(self) -> dict[str, int]:
        uses: dict[str, int] = {}
        for site in self.module.calls.values():
            for buffer in site.buffers:
                anchor = self.places[buffer].anchor
                if anchor is not None:
                    uses[anchor] = uses.get(anchor, 0) + 1
        return uses

    def _free(self, position: int) -> None:
        """Drop storages and inputs after their last use."""
        freed = set(self.plan.frees.get(position, ()))
        ended = [name for name in self.held if name in self.plan.slots and self.plan.slots[name].storage in freed]
        ended += [name for name in self.held if name in freed and name not in ended]
        ended += [name for name, end in self.input_ends.items() if end == position]
        self.forget(ended)


def _call_text(node: Extern) -> str:
    """Op and source line, for messages."""
    return f"{node.out_op or node.op}{' at ' + node.origin.source if node.origin.source else ''}"


def _out_arguments(op: str, count: int) -> list[str]:
    """Keyword names of the results that an out overload writes.

    Raises:
        CompilerBug: the overload does not write ``count`` tensors.
    """
    overload: Any = torch.ops
    for part in op.split("."):
        overload = getattr(overload, part)
    names = [argument.name for argument in overload._schema.arguments if argument.is_out]
    if len(names) != count:
        raise CompilerBug(f"{op} writes {len(names)} tensors, the program wants {count}")
    return names
