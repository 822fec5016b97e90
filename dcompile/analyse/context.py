"""What passes are handed besides the graph: the options, the prices, and a place to leave reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dcompile.analyse.cost import CostModel
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Node
from dcompile.options import Options
from dcompile.plan import Verdict

NodePrices = dict[int, tuple[Node, float]]
"""Microseconds by ``id(node)``, for graphs that have nodes in common; holds the nodes so that ids stay theirs."""


@dataclass
class Context:
    """Handed from pass to pass during one compile; never ambient.

    Attributes:
        options: the compile's options.
        costs: prices of kernels, library calls and collectives, in microseconds.
        verdicts: decisions so far, in the order they were taken.
        prices: those of nodes that were asked for before; graphs have most nodes in common.
        measure: microseconds of a KERNELS graph on the GPU at hand, None where it cannot be measured.
        tf32: the library may round operands of f32 matrix products to tf32.
    """

    options: Options
    costs: CostModel
    verdicts: list[Verdict] = field(default_factory=list)
    prices: NodePrices = field(default_factory=dict)
    measure: Callable[[Graph], float | None] | None = None
    tf32: bool = False

    def verdict(self, stage: str, subject: str, decision: str, reason: str) -> None:
        """Record what ``stage`` decided about ``subject`` and why; shown by ``DCOMPILE_SHOW=verdicts``."""
        self.verdicts.append(Verdict(stage, subject, decision, reason))
