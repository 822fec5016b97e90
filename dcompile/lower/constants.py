"""Constants on the device that uses them: what a program would copy there in every call is made there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dcompile.ir import expr as ex
from dcompile.ir.nodes import Pointwise
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering, loop_index


class OnDevice:
    """A constant tensor on another device, or of another type, than the program has it; made by the first call.

    Args:
        tensor: the constant.
        like: a fake tensor of the wanted device, dtype, sizes and strides.
    """

    def __init__(self, tensor: torch.Tensor, like: torch.Tensor) -> None:
        self.tensor = tensor
        self.device, self.dtype = like.device, like.dtype
        self.shape, self.stride = tuple(map(int, like.shape)), tuple(map(int, like.stride()))
        self._made: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self._made is None:
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
            self._made = made.copy_(self.tensor)
        return self._made


def rebuilt(b: Lowering, source: Value, constants: Sequence[tuple[Value, Any]]) -> tuple[Value, OnDevice | None] | None:
    """What ``_to_copy`` to another device gives if ``source`` is a constant, and what to pass for it.

    A computed constant (a number everywhere, a ramp) is computed on the other device. None if ``source`` is no constant
    or stays on its device; then the copy is a step of the program.
    """
    out = b.outs[0]
    if out is None or out.device == source.device:
        return None
    maker = next((n for n in b.nodes if isinstance(n, Pointwise) and n.out is source), None)
    if maker is not None and not ex.loads(maker.expr):
        return b.pointwise(out, maker.expr), None
    name = source.name
    if maker is not None and isinstance(maker.expr, ex.Load) and maker.expr.index == loop_index(source.shape):
        name = maker.expr.buffer  # a fresh copy of the constant
    for value, tensor in constants:
        if value.name == name and isinstance(tensor, torch.Tensor) and value.shape == out.shape:
            return out, OnDevice(tensor, b.node.meta["val"])
    return None
