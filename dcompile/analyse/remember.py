"""Facts of a graph are found once: passes and candidates of the scheduler ask for the same ones again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import ref

from dcompile.ir.graph import Graph

T = TypeVar("T")


def once_a_graph(analysis: Callable[[Graph], T]) -> Callable[[Graph], T]:
    """``analysis``, with its result kept as long as the graph lives; callers must not change the result.

    Graphs are told apart by identity: comparing two of them is as dear as most analyses.
    """
    kept: dict[int, tuple[ref[Graph], T]] = {}

    @wraps(analysis)
    def find(graph: Graph) -> T:
        key = id(graph)
        entry = kept.get(key)
        if entry is not None and entry[0]() is graph:
            return entry[1]

        def forget(gone: ref[Graph]) -> None:
            held = kept.get(key)
            if held is not None and held[0] is gone:
                kept.pop(key, None)

        result = analysis(graph)
        kept[key] = (ref(graph, forget), result)
        return result

    return find
