"""Which nodes of a functional graph share storage, and who still reads a storage after a given node."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx


class Storages:
    """Storage classes of the tensors of a graph.

    A functional graph gives every result that is no view a fresh fake storage. ``join`` makes two classes one, for a
    rewrite that puts a result where its operand was.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.position = {node: n for n, node in enumerate(gm.graph.nodes)}
        self._members: dict[Hashable, list[fx.Node]] = {}
        self._joined: dict[Hashable, Hashable] = {}
        for node in gm.graph.nodes:
            if (key := _storage(node)) is not None:
                self._members.setdefault(key, []).append(node)

    def of(self, node: fx.Node) -> Hashable | None:
        """The class of a node that is one tensor."""
        key = _storage(node)
        while key in self._joined:
            key = self._joined[key]
        return key

    def join(self, a: fx.Node, b: fx.Node) -> None:
        first, second = self.of(a), self.of(b)
        if first is not None and second is not None and first != second:
            self._joined[second] = first
            self._members[first] += self._members.pop(second)

    def members(self, node: fx.Node) -> list[fx.Node]:
        """Every tensor in the storage of ``node``, itself included."""
        key = self.of(node)
        return [] if key is None else self._members[key]

    def readers_after(self, node: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
        """Nodes after ``last`` that use a tensor in the storage of ``node``; the graph's output counts."""
        limit = self.position[last]
        for member in self.members(node):
            yield from (user for user in member.users if self.position.get(user, limit) > limit)

    def belongs_outside(self, node: fx.Node) -> bool:
        """Whether the storage is the caller's, or a constant's."""
        return any(member.op != "call_function" for member in self.members(node))

    def shared_with(self, node: fx.Node, others: Iterable[Any]) -> bool:
        """Whether one of ``others`` lies in the storage of ``node``."""
        key = self.of(node)
        return any(isinstance(other, fx.Node) and self.of(other) == key for other in others)


def _storage(node: fx.Node) -> Hashable | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # a layout without storage
        return None
