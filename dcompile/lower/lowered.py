"""What lowering gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dcompile.ir.graph import Graph
from dcompile.lower.constants import OnDevice


@dataclass(frozen=True)
class SizeOf:
    """Size ``dim`` of the tensor input at position ``input``."""

    input: int
    dim: int


Extra = torch.Tensor | OnDevice | SizeOf
"""An input the traced program does not list: a constant tensor, or a size symbol that is only known as an extent."""


@dataclass(frozen=True)
class Lowered:
    """Result of ``lower``.

    Attributes:
        graph: at level LOOPS, checked.
        group_names: process group (as the traced program names it) by the group's label in the graph.
        extra_inputs: what the caller appends to the program's own inputs, in this order.
        programs: those of ``graph.graphs`` by name; what they take besides their operands, the calls pass.
        modules: traced programs that only the library can run, by name.
    """

    graph: Graph
    group_names: dict[str, Any]
    extra_inputs: tuple[Extra, ...] = ()
    programs: Mapping[str, Lowered] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=dict)
