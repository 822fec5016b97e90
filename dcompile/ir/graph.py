"""A graph: inputs, nodes in program order, outputs. Immutable; passes return new graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import sympy

from dcompile.errors import CompilerBug
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Node, Ref
from dcompile.ir.symbolic import check_numbers
from dcompile.ir.types import Def, Number, Size, Value

Output: TypeAlias = Ref | Size | float | bool | None
"""What a graph returns in one place: a tensor, a (symbolic) number, or None."""


@dataclass(frozen=True)
class SizeInput:
    """A graph input that is an integer: the run-time value of a size symbol."""

    symbol: sympy.Symbol
    hint: int


@dataclass(frozen=True)
class Graph:
    """One function.

    Attributes:
        name: ``"forward"``, ``"backward"`` or ``"inference"``, possibly with a suffix.
        inputs: tensors and size symbols in calling order.
        nodes: in program order, which is a legal execution order.
        outputs: in returning order; a name may appear more than once.
        graphs: the programs its library calls take (``Literal("graph", name)``), in order of their names' appearance.
    """

    name: str
    inputs: tuple[Value | SizeInput, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    graphs: tuple[Graph, ...] = ()

    @cached_property
    def defs(self) -> dict[str, Def]:
        """Everything defined, by name.

        Raises:
            CompilerBug: a name is defined twice.
        """
        found: dict[str, Def] = {}
        values = (v for v in self.inputs if isinstance(v, Value))
        for item in (*values, *(d for node in self.nodes for d in node.defs)):
            if item.name in found:
                raise CompilerBug(f"{self.name}: {item.name} is defined twice")
            found[item.name] = item
        return found

    def value(self, name: str) -> Value:
        """The tensor of that name.

        Raises:
            CompilerBug: no such definition, or it is not a tensor.
        """
        found = self.defs.get(name)
        if not isinstance(found, Value):
            raise CompilerBug(f"{self.name}: {name} is {'not defined' if found is None else 'not a tensor'}")
        return found

    @cached_property
    def producer(self) -> dict[str, int]:
        """Position of the node that defines each name; inputs are absent."""
        return {d.name: position for position, node in enumerate(self.nodes) for d in node.defs}

    @cached_property
    def users(self) -> dict[str, tuple[int, ...]]:
        """Positions of the nodes that read each name, ascending; outputs are not counted."""
        found: dict[str, list[int]] = {name: [] for name in self.defs}
        for position, node in enumerate(self.nodes):
            for name in node.operands:
                found.setdefault(name, []).append(position)
        return {name: tuple(positions) for name, positions in found.items()}

    @cached_property
    def output_names(self) -> frozenset[str]:
        return frozenset(out.name for out in self.outputs if isinstance(out, Ref))

    @cached_property
    def input_names(self) -> frozenset[str]:
        return frozenset(v.name for v in self.inputs if isinstance(v, Value))

    @cached_property
    def size_hints(self) -> dict[sympy.Symbol, int]:
        """Size symbols with the value seen while tracing; for those the program learns, one that is possible."""
        found = {item.symbol: item.hint for item in self.inputs if isinstance(item, SizeInput)}
        return found | {symbol(n.name): n.hint for n in self.defs.values() if isinstance(n, Number)}

    def with_nodes(self, nodes: tuple[Node, ...]) -> Graph:
        return replace(self, nodes=nodes)

    def check(self) -> Graph:
        """Every operand is defined and every number learned before its use, every output is defined; returns the graph
        itself.

        Raises:
            CompilerBug: naming the node and the operand.
        """
        known = set(self.input_names)
        for node in self.nodes:
            for name in node.operands:
                if name not in known:
                    raise CompilerBug(f"{self.name}: {type(node).__name__} reads {name} before it is defined")
            known.update(d.name for d in node.defs)
        check_numbers(self)
        self.defs  # noqa: B018  (raises on a second definition)
        for name in self.output_names - known:
            raise CompilerBug(f"{self.name}: output {name} is not defined")
        return self


def hint(size: Size, hints: dict[sympy.Symbol, int]) -> int:
    """The value of ``size`` as seen while tracing, for decisions that may be wrong without being unsafe."""
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(v) for s, v in hints.items()}))


def given_bytes(graph: Graph) -> int:
    """Bytes of the tensors that ``graph`` is called with and reads, or hands back, at the size hints."""
    values = [item for item in graph.inputs if isinstance(item, Value)]
    read = [value for value in values if graph.users.get(value.name) or value.name in graph.output_names]
    return sum(hint(value.nbytes, graph.size_hints) for value in read)
