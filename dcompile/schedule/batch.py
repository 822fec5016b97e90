"""Batching: small GPU kernels that do not need each other become one launch, each in programs of its own.

A small kernel costs its launch, on host and GPU, more than its work: the casts of weights under autocast, the
sums that are gradients of biases. Kernels move towards each other as far as what they read and who reads them allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from dcompile.analyse.context import Context
from dcompile.analyse.dependence import is_legal, predecessors
from dcompile.analyse.flops import work
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import product
from dcompile.ir.kernel import Fold, Kernel, Nest, ScanLoop, Scratch, statements
from dcompile.ir.nodes import View
from dcompile.ir.types import Origin

SMALL_BYTES = 16 * 2**20
"""Most bytes a batched kernel moves: 6 us on an H100, little more than launching it costs."""

BATCH_BYTES = 64 * 2**20
"""Most bytes one batch moves, and so the most memory it holds longer than its members would."""

MOST_MEMBERS, MOST_BUFFERS = 16, 48
"""Of one batch: each member is compiled into the one kernel, each buffer is a parameter."""

LONGEST_ROW = 1024
"""Elements a member folds at once: rows in registers do not make the other members' programs larger than this."""


def batch_kernels(graph: Graph, ctx: Context) -> Graph:
    """KERNELS to KERNELS with small independent GPU kernels in batches. A batch is a Kernel of several nests."""
    members = {n for n, node in enumerate(graph.nodes) if isinstance(node, Kernel) and _may_join(node, graph)}
    if len(members) < 2:
        return graph
    groups = _Batches(graph, members).find()
    if not groups:
        return graph
    order = _order(graph, groups)
    if not is_legal(graph, order):
        ctx.verdict("batch", graph.name, "nothing batched", "the batches' order would change what the program does")
        return graph
    owner = {position: batch for batch in groups for position in batch.positions}
    nodes = []
    for position in order:
        batch = owner.get(position)
        if batch is None:
            nodes.append(graph.nodes[position])
        elif position == batch.positions[0]:
            merged = _merged([node for p in batch.positions if isinstance(node := graph.nodes[p], Kernel)])
            nodes.append(merged)
            ctx.verdict("batch", merged.outs[0].name, f"{len(batch.positions)} kernels in one launch", "all are small")
    return graph.with_nodes(tuple(nodes)).check()


def _may_join(node: Kernel, graph: Graph) -> bool:
    """One nest of static size on the GPU that writes fresh memory, small, and short along its folds."""
    if len(node.body) != 1 or not isinstance(node.body[0], Nest) or node.mutates:
        return False
    if any(out.device != "cuda" for out in node.outs):
        return False
    if any(isinstance(s, Scratch | ScanLoop) for s in statements(node.body)):
        return False
    nests = [s for s in statements(node.body) if isinstance(s, Nest | Fold)]
    if not all(isinstance(size, int) for s in nests for _, size in s.axes):
        return False
    column = any(role.name == "SIMD" for role in node.body[0].roles[-1:])
    inner = [s for s in node.body[0].body if isinstance(s, Nest | Fold)]
    if not column and any(hint(product(tuple(n for _, n in s.axes)), {}) > LONGEST_ROW for s in inner):
        return False
    return work(node, graph).nbytes <= SMALL_BYTES


@dataclass
class _Batch:
    """Members found so far, and where they may stand: before a node from ``low`` to ``high``."""

    positions: list[int]
    low: int
    high: int
    nbytes: float
    buffers: set[str] = field(default_factory=set)
    from_inputs: bool = True

    @property
    def place(self) -> int:
        """The node it is put in front of: late if it only reads inputs, which live on anyway, else early."""
        return self.high if self.from_inputs else self.low


class _Batches:
    """Greedy: members in the order in which they are needed, each batch filled with those whose time fits its own."""

    def __init__(self, graph: Graph, members: set[int]) -> None:
        self.graph = graph
        self.before = predecessors(graph)
        self.readers = _readers(graph, self.before)
        self.end = len(graph.nodes)
        self.work = {n: work(graph.nodes[n], graph).nbytes for n in members}
        self.placed: dict[int, int] = {}
        self.queue = sorted(members, key=lambda n: (self._window(n)[1], n))

    def find(self) -> list[_Batch]:
        found: list[_Batch] = []
        for at, first in enumerate(self.queue):
            low, high = self._window(first)
            if first in self.placed or low > high:
                continue
            batch = _Batch([first], low, high, self.work[first])
            self._enter(batch, first)
            for other in self.queue[at + 1 :]:
                if len(batch.positions) == MOST_MEMBERS:
                    break
                if other not in self.placed and self._fits(batch, other):
                    low, high = self._window(other)
                    batch.positions.append(other)
                    batch.low, batch.high = max(batch.low, low), min(batch.high, high)
                    batch.nbytes += self.work[other]
                    self._enter(batch, other)
            if len(batch.positions) > 1:
                batch.positions.sort()
                self.placed.update(dict.fromkeys(batch.positions, batch.place))
                found.append(batch)
        return found

    def _window(self, position: int) -> tuple[int, int]:
        """The first and last node it may stand in front of, given where batches stand that it needs or that need it."""
        placed = self.placed
        low = max((placed.get(p, p) + 1 for p in self.before[position]), default=0)
        high = min((placed[r] - 1 if r in placed else r for r in self.readers[position]), default=self.end)
        return low, high

    def _enter(self, batch: _Batch, position: int) -> None:
        node = self.graph.nodes[position]
        batch.buffers |= self._touched(position)
        batch.from_inputs &= all(name in self.graph.input_names for name in node.operands)

    def _touched(self, position: int) -> set[str]:
        node = self.graph.nodes[position]
        return {*node.operands, *(item.name for item in node.defs)}

    def _fits(self, batch: _Batch, other: int) -> bool:
        low, high = self._window(other)
        if max(batch.low, low) > min(batch.high, high):
            return False
        if batch.nbytes + self.work[other] > BATCH_BYTES or len(batch.buffers | self._touched(other)) > MOST_BUFFERS:
            return False
        return not any(p in self.before[other] or other in self.readers[p] | self.before[p] for p in batch.positions)


def _readers(graph: Graph, before: Sequence[frozenset[int]]) -> list[set[int]]:
    """Direct successors of each node; those of a view count for what is viewed, the view itself moves along."""
    after: list[set[int]] = [set() for _ in graph.nodes]
    for position in reversed(range(len(graph.nodes))):
        own = after[position] if isinstance(graph.nodes[position], View) else {position}
        for other in before[position]:
            after[other] |= own
    return after


def _order(graph: Graph, batches: Sequence[_Batch]) -> list[int]:
    """Program order with every batch in its place, and views behind what they show."""
    at: dict[int, float] = {p: batch.place - 0.5 for batch in batches for p in batch.positions}
    for position, node in enumerate(graph.nodes):
        if isinstance(node, View):
            base = graph.producer.get(node.base)
            at[position] = max(float(position), at.get(base, base) + 0.25) if base is not None else float(position)
    return sorted(range(len(graph.nodes)), key=lambda n: (at.get(n, n), n))


def _merged(kernels: Sequence[Kernel]) -> Kernel:
    return replace(
        kernels[0],
        outs=tuple(out for kernel in kernels for out in kernel.outs),
        body=tuple(stmt for kernel in kernels for stmt in kernel.body),
        targets=(None,) * sum(len(kernel.outs) for kernel in kernels),
        inplace=(),
        origin=reduce(Origin.__or__, (kernel.origin for kernel in kernels)),
    )
