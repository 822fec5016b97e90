"""A ``torch.compile`` backend that captures graphs and runs them with eager ops: tests of capture by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dcompile.capture import Captured, capture


class EagerBackend:
    """Pass an instance as ``backend=``; ``graphs`` holds what was captured, in order."""

    def __init__(self) -> None:
        self.graphs: list[Captured] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, self._compile)

    def _compile(self, captured: Captured) -> Callable[[list[Any]], Sequence[Any]]:
        self.graphs.append(captured)

        def run(inputs: list[Any]) -> Sequence[Any]:
            arguments = list(inputs)
            inputs.clear()
            return fx.Interpreter(captured.gm).run(*arguments)  # type: ignore[no-any-return]

        return run

    def kinds(self) -> list[str]:
        """Kinds of the graphs captured so far."""
        return [captured.kind for captured in self.graphs]

    def ops(self, index: int) -> list[str]:
        """Op names of one graph, in program order."""
        return [
            str(node.target)
            for node in self.graphs[index].gm.graph.nodes
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        ]
