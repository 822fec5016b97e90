"""State of one lowering and the few ways to emit nodes. Rules see only this."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from dcompile.collectives.nodes import Wait
from dcompile.errors import Unsupported
from dcompile.ir import expr as ex
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Axis, Extern, Node, Pointwise, Reduction, Store, View
from dcompile.ir.symbolic import CHECK
from dcompile.ir.types import DType, Number, Origin, Size, Value, contiguous_stride
from dcompile.lower.flight import Flights
from dcompile.lower.sizes import Sizes
from dcompile.lower.table import NoRule

_AMBIGUOUS = re.compile(r"[a-z]\d+")
"""Names like ``i0`` or ``s3`` would read like loop variables and sizes in the text form."""
MAX_RANK = 64
SEED_NAMES = {device: f"seeds_{device}" for device in ("cpu", "cuda")}
"""The value that holds the seeds of all random ops of a graph on a device."""
_I = tuple(symbol(f"i{n}") for n in range(MAX_RANK))
_R = tuple(symbol(f"r{n}") for n in range(MAX_RANK))
ZERO = sympy.Integer(0)


def loop_axes(shape: Sequence[Size]) -> tuple[Axis, ...]:
    """Output loop variables ``i0, i1, …`` with the extents of ``shape``."""
    return tuple(zip(_I, shape, strict=False))


def loop_index(shape: Sequence[Size]) -> tuple[sympy.Expr, ...]:
    """The position ``(i0, i1, …)``; 0 along dimensions of size 1."""
    return tuple(ZERO if size == 1 else var for var, size in zip(_I, shape, strict=False))


def reduce_axes(sizes: Sequence[Size]) -> tuple[Axis, ...]:
    """Reduction variables ``r0, r1, …`` with the given extents."""
    return tuple(zip(_R, sizes, strict=False))


class Lowering:
    """One graph in the making.

    Attributes:
        nodes: emitted so far.
        node: the fx node being lowered.
        outs: what it returns, as values ready to be defined, those in nested lists in order; None where it returns no
            tensor.
        numbers: what stands for the numbers among them in the program, by position.
        group_size: number of ranks of a process group, given as the traced program names it.
        learned: size symbols whose values the program learns while it runs.
        main_device: where numbers that are no tensors in the traced program are computed.
    """

    def __init__(self, names: set[str], group_size: Callable[[Any], int]) -> None:
        self.nodes: list[Node] = []
        self.names = names
        self.sizes = Sizes()
        self.flights = Flights(self)
        self.group_size = group_size
        self.group_names: dict[str, Any] = {}
        self.origin = Origin()
        self.node: fx.Node = None  # type: ignore[assignment]
        self.outs: tuple[Value | None, ...] = ()
        self.numbers: dict[int, Size | float | bool] = {}
        self.seed_counts: dict[str, int] = {}
        self.learned: set[sympy.Symbol] = set()
        self.main_device = "cpu"
        self._newer: dict[str, Value] = {}
        self._of_inputs: set[str] = set()
        self._views: dict[str, tuple[View, Value]] = {}

    # names and values

    def fresh(self, name: str) -> str:
        """``name`` made unique and unmistakable for a loop variable."""
        name = re.sub(r"\W", "_", name)
        if _AMBIGUOUS.fullmatch(name):
            name = f"{name}_"
        unique, n = name, 0
        while unique in self.names:
            n += 1
            unique = f"{name}_{n}"
        self.names.add(unique)
        return unique

    def value(self, name: str, meta: torch.Tensor) -> Value:
        """A value with the dtype, layout and device of a fake tensor.

        Raises:
            Unsupported: an element type the IR has no word for, or a layout that is not strided.
        """
        dtype = DType.of(meta.dtype)
        if dtype is None or meta.layout is not torch.strided:
            raise Unsupported(
                self.origin,
                what=f"a tensor of type {meta.dtype} and layout {meta.layout}",
                instead="keep this computation outside the compiled function",
            )
        if len(meta.shape) > MAX_RANK:
            raise Unsupported(self.origin, f"a tensor of {len(meta.shape)} dimensions", f"use at most {MAX_RANK}")
        return Value(name, dtype, self.sizes.sizes(meta.shape), self.sizes.sizes(meta.stride()), meta.device.type)

    def temp(self, suffix: str, dtype: DType, shape: Sequence[Size], device: str) -> Value:
        """A contiguous intermediate value named after the current node."""
        shape = tuple(shape)
        return Value(self.fresh(f"{self.node.name}_{suffix}"), dtype, shape, contiguous_stride(shape), device)

    @property
    def out(self) -> Value:
        """The one tensor the current node returns."""
        if len(self.outs) != 1 or self.outs[0] is None:
            raise NoRule
        return self.outs[0]

    def out_at(self, position: int) -> Value:
        """The tensor at ``position`` of the outputs of the current node."""
        found = self.outs[position]
        if found is None:
            raise NoRule
        return found

    # versions

    def current(self, value: Value) -> Value:
        """The newest version of ``value``; a view of something mutated since is taken again.

        Raises:
            Unsupported: its storage belongs to a collective that has not been waited for.
        """
        self.flights.check_readable(value)
        if not self._newer:
            return value
        while (newer := self._newer.get(value.name)) is not None:
            value = newer
            self.flights.check_readable(value)
        if (found := self._views.get(value.name)) is not None:
            view, base = found
            now = self.current(base)
            if now is not base:
                again = Value(self.fresh(value.name), value.dtype, value.shape, value.stride, value.device)
                self.view(again, now, view.index)
                self._newer[value.name] = again
                return again
        return value

    def supersede(self, old: Value, new: Value) -> None:
        """``new`` is ``old`` after a mutation."""
        if old.name in self._of_inputs:
            self._of_inputs.add(new.name)
        self._newer[old.name] = new

    def depends_on_data(self, size: Any) -> bool:
        """Whether the program learns ``size`` only while it runs, so that its hint decides nothing."""
        return isinstance(size, sympy.Expr) and bool(size.free_symbols & self.learned)

    def is_input(self, value: Value) -> bool:
        """Whether ``value``, which is no view, is an input or a later version of one."""
        return value.name in self._of_inputs

    def add_input(self, value: Value) -> None:
        """``value`` is the caller's."""
        self._of_inputs.add(value.name)

    def root(self, value: Value) -> Value:
        """The value whose storage ``value`` views, at its newest version."""
        while (found := self._views.get(value.name)) is not None:
            value = found[1]
        while (newer := self._newer.get(value.name)) is not None:
            value = newer
        return value

    def view_of(self, value: Value) -> tuple[View, Value] | None:
        """The View that defines ``value`` and its base, or None."""
        return self._views.get(value.name)

    # expressions

    def element(self, operand: Any, shape: Sequence[Size], dtype: DType | None = None) -> ex.Expr:
        """``operand`` broadcast to ``shape`` at the position ``(i0, …)``, converted to ``dtype`` (None: its own)."""
        if isinstance(operand, Value):
            lead = len(shape) - len(operand.shape)
            where = tuple(ZERO if n == 1 else _I[lead + k] for k, n in enumerate(operand.shape))
            found: ex.Expr = ex.load(operand.name, where, operand.dtype)
        elif isinstance(operand, bool | int | float):
            return ex.const(operand, dtype) if dtype is not None else ex.const(operand, DType.F32)
        elif isinstance(operand, sympy.Expr):
            found = ex.index(operand)
        else:
            raise NoRule
        return found if dtype is None else ex.to(found, dtype)

    # nodes

    def emit(self, node: Node) -> None:
        if isinstance(node, Extern):
            self.learned |= {symbol(number.name) for number in node.binds}
        self.nodes.append(node)

    def learn(self, outs: Sequence[Value | None]) -> tuple[Number, ...]:
        """The numbers that a call tells by the layout of what it returns, those that stand alone there first."""
        sizes = self.sizes
        entries = [n for out in outs if out is not None for n in (*out.shape, *out.stride) if isinstance(n, sympy.Expr)]
        entries.sort(key=lambda n: len(n.args))
        free = [s for entry in entries for s in sorted(entry.free_symbols, key=str) if s in sizes.unlearned]
        sizes.told(free)
        return tuple(Number(s.name, sizes.hints[s]) for s in dict.fromkeys(free))

    def pointwise(self, out: Value, expr: ex.Expr) -> Value:
        """``out[i0, …] = expr``, converted to the dtype of ``out``."""
        self.emit(Pointwise(out=out, axes=loop_axes(out.shape), expr=ex.to(expr, out.dtype), origin=self.origin))
        return out

    def reduction(self, out: Value, kind: str, raxes: tuple[Axis, ...], expr: ex.Expr) -> Value:
        """``out[i0, …] = fold(kind, expr)`` over ``raxes``; a fold of one element is that element.

        ``expr`` must not use reduction variables of extent 1.
        """
        if all(size == 1 for _, size in raxes):
            return self.pointwise(out, ex.const(0, DType.I64) if kind in ("argmax", "argmin") else expr)
        axes = loop_axes(out.shape)
        self.emit(Reduction(out=out, kind=kind, axes=axes, raxes=raxes, expr=expr, origin=self.origin))
        return out

    def view(self, out: Value, base: Value, index: tuple[sympy.Expr, ...]) -> Value:
        """``out[i0, …]`` is ``base[index]``."""
        node = View(out=out, base=base.name, axes=loop_axes(out.shape), index=index, origin=self.origin)
        self._views[out.name] = (node, base)
        self.emit(node)
        return out

    def store(
        self,
        target: Value,
        shape: Sequence[Size],
        index: tuple[sympy.Expr, ...],
        expr: ex.Expr,
        bind: tuple[ex.Expr, ...] = (),
        mode: str = "set",
        name: str | None = None,
    ) -> Value:
        """``target[index] = expr`` for all positions of ``shape``; gives the next version of ``target``.

        A view is written through: the store goes into what it views, and the view is taken again.
        """
        self.flights.settle(self.root(target))
        if (found := self._views.get(target.name)) is not None:
            base = self.current(found[1])
            through = dict(zip(_I, index, strict=False))
            inner = tuple(i.xreplace(through) for i in found[0].index)
            self.store(base, shape, inner, expr, bind, mode)
            return self.current(target)
        out = Value(name or self.fresh(f"{target.name}_new"), target.dtype, target.shape, target.stride, target.device)
        self.emit(
            Store(
                out=out,
                target=target.name,
                axes=loop_axes(shape),
                index=index,
                expr=ex.to(expr, target.dtype),
                bind=bind,
                mode=mode,
                origin=self.origin,
            )
        )
        self.supersede(target, out)
        return out

    def library(
        self,
        out: Value,
        op: str,
        args: tuple[Any, ...],
        kwargs: tuple[tuple[str, Any], ...] = (),
        out_op: str | None = None,
    ) -> Value:
        """A library call on purpose (not a fallback) with one result."""
        self.emit(Extern(outs=(out,), op=op, args=args, kwargs=kwargs, out_op=out_op, origin=self.origin))
        return out

    def check(self, fact: tuple[Size, str, Size], message: str) -> None:
        """The program raises ``message`` where the two sides do not stand so (``ir.symbolic.RELATIONS``)."""
        self.emit(Extern(outs=(), op=CHECK, args=(*fact, message), effect=True, origin=self.origin))

    def wait(self, wait: Wait) -> None:
        self.emit(wait)
