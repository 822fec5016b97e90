"""N ranks interpreted in one process: what every later stage and every generated program is compared with.

Graphs of every level run. Memory is modelled, not only values: views and versions share storage, fresh memory is
poisoned, and a collective's results (in place: its buffer) are poisoned from its launch to its wait, so that a program
that reads what it must not read gets NaN. Nothing here is fast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dcompile.errors import Divergence
from dcompile.ir.graph import Graph
from dcompile.reference.communicate import Argument, exchange
from dcompile.reference.rank import Result, Steps, run_rank

Groups = Mapping[str, Sequence[Sequence[int]]]


@dataclass
class _Rank:
    """One rank's program: what it waits for, and what it returned in the end."""

    steps: Steps
    waiting: Argument | None = None
    result: list[Result] | None = None

    def advance(self, rank: int, answer: list[Tensor] | None) -> None:
        try:
            node, sources, splits = next(self.steps) if answer is None else self.steps.send(answer)
            self.waiting = Argument(rank, node, sources, splits)
        except StopIteration as stop:
            self.waiting, self.result = None, stop.value


def run_reference(
    graphs: Sequence[Graph], inputs: Sequence[Sequence[Tensor | int]], groups: Groups | None = None
) -> list[list[Result]]:
    """Run one graph a rank, collectives in lock step.

    Args:
        graphs: the program of each rank; levels may differ between calls, not needed to be equal between ranks.
        inputs: for each rank its inputs in calling order; tensors are mutated where the program mutates them.
        groups: for each label the rank lists that partition the ranks; a label that is absent means all ranks.

    Returns:
        for each rank its outputs in returning order.

    Raises:
        ValueError: an input does not fit the graph's declaration.
        Divergence: ranks launch different collectives, or wait for ranks that have ended.
        CompilerBug: the program breaks a rule of the IR (touches memory outside a buffer, writes a source in flight).
        IndexError: a data-dependent position is out of range.
        ZeroDivisionError: an integer was divided by zero.
    """
    ranks = [_Rank(run_rank(graph, list(given))) for graph, given in zip(graphs, inputs, strict=True)]
    for rank, program in enumerate(ranks):
        program.advance(rank, None)
    while any(program.result is None for program in ranks):
        if not _meet(ranks, groups or {}):
            raise Divergence(_stuck(ranks))
    return [program.result or [] for program in ranks]


def _members(label: str, rank: int, world: int, groups: Groups) -> tuple[int, ...]:
    for members in groups.get(label, [range(world)]):
        if rank in members:
            return tuple(members)
    raise Divergence(f"rank {rank} is in no group of {label}: {groups.get(label)}")


def _meet(ranks: list[_Rank], groups: Groups) -> bool:
    """Complete every collective that all its members have launched; whether there was one."""
    arrived: dict[tuple[str, tuple[int, ...]], list[Argument]] = defaultdict(list)
    for rank, program in enumerate(ranks):
        if program.waiting is not None:
            label = program.waiting.start.group.label
            arrived[label, _members(label, rank, len(ranks), groups)].append(program.waiting)
    ready = {key: found for key, found in arrived.items() if len(found) == len(key[1])}
    for (_, members), found in ready.items():
        by_rank = {argument.rank: argument for argument in found}
        answers = exchange([by_rank[rank] for rank in members])
        for rank, answer in zip(members, answers, strict=True):
            ranks[rank].advance(rank, answer)
    return bool(ready)


def _stuck(ranks: list[_Rank]) -> str:
    lines = []
    for rank, program in enumerate(ranks):
        if program.waiting is None:
            lines.append(f"rank {rank} has ended")
        else:
            start = program.waiting.start
            lines.append(f"rank {rank} waits in {start.pending.name} ({start.kind.value} over {start.group.label})")
    return "the ranks wait for each other: " + "; ".join(lines)


__all__ = ["Groups", "Result", "run_reference"]
