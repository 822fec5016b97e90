"""Inputs, constants and outputs of a traced program."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from dcompile.errors import Unsupported
from dcompile.ir import expr as ex
from dcompile.ir.graph import Output, SizeInput
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Extern, Literal, Ref
from dcompile.ir.types import DType, Origin, Value
from dcompile.lower.builder import SEED_NAMES, Lowering
from dcompile.lower.constants import OnDevice
from dcompile.lower.higher_order import conform
from dcompile.lower.lowered import Extra, SizeOf

SCALAR = "dcompile_scalar"
"""Key of ``node.meta`` for the number in a constant tensor of one element, which cannot tell it while tracing."""


class Edges:
    """Inputs and outputs of the graph under construction.

    Attributes:
        names: what the values of fx nodes are called.
        inputs: those of the graph so far.
        constants: constant tensors, which become its last inputs.
    """

    def __init__(self, b: Lowering, gm: fx.GraphModule, names: dict[fx.Node, str]) -> None:
        self.b, self.gm, self.names = b, gm, names
        self.inputs: list[Value | SizeInput] = []
        self.constants: list[tuple[Value, torch.Tensor | OnDevice]] = []

    def constant(self, name: str, tensor: torch.Tensor) -> Value:
        """A constant tensor as an operand."""
        value = self.b.value(self.b.fresh(name), tensor)
        self.constants.append((value, tensor))
        return value

    def placeholder(self, node: fx.Node) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.Tensor):
            value = self.b.value(self.names[node], meta)
            self.b.sizes.told(size for size in (*value.shape, *value.stride) if isinstance(size, sympy.Symbol))
            self.inputs.append(value)
            self.b.add_input(value)
            return value
        if isinstance(meta, torch.SymInt):
            size = self.b.sizes.size(meta)
            self.b.sizes.told((size,))
            known = {i.symbol for i in self.inputs if isinstance(i, SizeInput)}
            plain = isinstance(size, sympy.Symbol) and size not in known
            slot = size if plain else symbol(self.b.fresh(f"size_{node.name}"))
            self.inputs.append(SizeInput(slot, self.b.sizes.hint(size)))
            return size
        if isinstance(meta, int) and not isinstance(meta, bool):
            self.inputs.append(SizeInput(symbol(self.b.fresh(f"size_{node.name}")), meta))
            return meta
        raise Unsupported(
            self.b.origin,
            what=f"a graph input of type {type(meta).__name__}",
            instead="pass tensors and integers; make other values constants of the function",
        )

    def attribute(self, node: fx.Node) -> Any:
        found: Any = self.gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            return found
        meta = node.meta.get("val", found)
        value = self.b.value(self.names[node], meta)
        if found.numel() == 1 and not value.dtype.library_only and type(found) in (torch.Tensor, torch.nn.Parameter):
            number = node.meta[SCALAR] if SCALAR in node.meta else found.item()
            return self.b.pointwise(value, ex.const(number, value.dtype))
        self.constants.append((value, found))
        return value

    def output(self, item: Any, found: Any, wanted: Value | None = None) -> Output:
        """What stands for the output ``item``, given what it is in the terms of rules and what its reader expects."""
        if isinstance(found, Value):
            found = conform(self.b, found, wanted)
        meta = item.meta.get("val") if isinstance(item, fx.Node) else None
        if isinstance(meta, torch.SymBool) and isinstance(found, sympy.Expr):
            found = self.b.pointwise(
                self.b.temp("truth", DType.BOOL, (), self.b.main_device),
                ex.to(ex.index(found), DType.BOOL),
            )
        if isinstance(found, Value):
            return Ref(found.name, item=isinstance(meta, torch.SymBool | torch.SymFloat))
        if found is None or isinstance(found, bool | int | float | sympy.Expr):
            return found
        raise Unsupported(self.b.origin, f"a graph output of type {type(found).__name__}", "return tensors and numbers")

    def extra_inputs(self) -> tuple[Extra, ...]:
        """Append inputs for size symbols that no integer input carries, and for constant tensors."""
        bound = {item.symbol for item in self.inputs if isinstance(item, SizeInput)} | self.b.learned
        extra: list[Extra] = []
        for missing in [s for s in self.b.sizes.hints if s not in bound]:
            place = next(
                (
                    SizeOf(position, value.shape.index(missing))
                    for position, value in enumerate(self.inputs)
                    if isinstance(value, Value) and missing in value.shape
                ),
                None,
            )
            if place is None:
                raise Unsupported(
                    self.b.origin,
                    what=f"the size symbol {missing}, which is neither an input nor the extent of one",
                    instead="mark the dimension static with torch._dynamo.mark_static",
                )
            self.inputs.append(SizeInput(missing, self.b.sizes.hints[missing]))
            extra.append(place)
        for value, tensor in self.constants:
            self.inputs.append(value)
            extra.append(tensor)
        return tuple(extra)

    def seeds(self) -> tuple[Extern, ...]:
        """One draw of seeds a device, for all random ops of the graph."""
        return tuple(
            Extern(
                outs=(Value(SEED_NAMES[device], DType.I64, (count,), (1,), device),),
                op="dcompile.seeds",
                args=(count,),
                kwargs=(("device", Literal("device", device)),) if device != "cpu" else (),
                effect=True,
                origin=Origin(("dcompile.seeds",)),
            )
            for device, count in self.b.seed_counts.items()
        )
