"""A fusion group: loops over one domain, each with the part it plays there."""

from __future__ import annotations

from dataclasses import dataclass

from dcompile.ir import expr as ex
from dcompile.ir.nodes import Reduction
from dcompile.ir.types import Value
from dcompile.schedule.loops import Domain, Placed


@dataclass(frozen=True)
class Member:
    """One loop in a group. ``spread`` is ``"fold"``, ``"row"``, ``"outer"`` or ``"strip"``."""

    position: int
    spread: str
    placed: Placed

    @property
    def name(self) -> str:
        return self.placed.form.node.out.name

    @property
    def out(self) -> Value:
        return self.placed.form.node.out

    @property
    def outs(self) -> tuple[Value, ...]:
        """Everything it defines, ``out`` first."""
        node = self.placed.form.node
        return (node.out, *node.more) if isinstance(node, Reduction) else (node.out,)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.outs)

    def loads(self) -> tuple[ex.Load, ...]:
        """All loads, those that decide where a store goes included."""
        return tuple(load for root in self.placed.roots for load in ex.loads(root))


@dataclass(frozen=True)
class Group:
    """Members in program order over one domain. ``column``: the inner range strides through memory, the last outer
    axis runs along it, and the group has no row members. ``strips``: the first outer axis counts strips of the others,
    which are rows, and members may reduce the columns of a strip."""

    domain: Domain
    column: bool
    members: tuple[Member, ...]
    strips: bool = False
