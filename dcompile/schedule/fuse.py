"""Fusion: loop nodes become kernels. Groups grow in program order; ``emit`` writes each group down as a loop nest.

A group iterates one domain: ``outer`` positions, and for each of them ``inner`` ones when it reduces. Its members are

- ``fold``: a reduction over inner for every outer position,
- ``row``: a pointwise loop over outer x inner,
- ``outer``: a pointwise loop over outer alone (all members of a group without inner).

A member joins when it shares a buffer with the group, when it reads what the group produces only at the position that
is being produced, and when no path leads from the group through another node back to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import sympy

from dcompile.analyse.alias import storage_roots, strided_views
from dcompile.analyse.context import Context
from dcompile.analyse.dependence import predecessors
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import product
from dcompile.ir.nodes import Node, Pointwise, Reduction, Scan, Store, View
from dcompile.ir.types import Size
from dcompile.schedule.emit import PARALLEL_WORK, emit_kernel
from dcompile.schedule.group import Group, Member
from dcompile.schedule.loops import Domain, Form, coefficient, form_of, place
from dcompile.schedule.one_hot import close_one_hot_sums
from dcompile.schedule.scan import scan_kernels
from dcompile.schedule.special import drop_trivial_folds
from dcompile.schedule.strips import strip_group

MAX_BUFFERS = 32
"""Most buffers one kernel touches: each needs an address register or a reload in every iteration, and hardware
prefetchers follow about this many streams."""

MAX_CANDIDATES = 12
"""Groups tried for one node, the ones sharing most bytes first; more were never chosen on GPT and Llama graphs."""


SHORTEST_CHUNK, LONGEST_CHUNK = 256, 4096
"""Elements one thread reduces at a stretch when a whole tensor is reduced: enough to fill vector lanes many times over,
few enough for the first-level cache."""


def fuse(graph: Graph, ctx: Context) -> Graph:
    """LOOPS to KERNELS: every Pointwise, Reduction and Store becomes part of a Kernel, every Scan one of its own."""
    graph = close_one_hot_sums(drop_trivial_folds(copy_unaliasable_views(graph), ctx), ctx)
    grouping = _Grouping(graph, ctx)
    for position in range(len(graph.nodes)):
        grouping.add(position)
    grouping.form_strips()
    fused = graph.with_nodes(grouping.nodes_in_order())
    return _drop_unused_views(fused)


def copy_unaliasable_views(graph: Graph) -> Graph:
    """Views that no strides can express become copies, for the readers that need memory."""
    if not any(isinstance(node, View) for node in graph.nodes):
        return graph
    strided = strided_views(graph)
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, View) and strided[node.out.name] is None:
            body = ex.load(node.base, node.index, node.out.dtype)
            node = Pointwise(out=node.out, axes=node.axes, expr=body, origin=node.origin)
        nodes.append(node)
    return graph.with_nodes(tuple(nodes))


def _drop_unused_views(graph: Graph) -> Graph:
    """Views only loops read are gone from memory once addresses are composed."""
    live = set(graph.output_names)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not isinstance(node, View) or node.out.name in live:
            live.update(node.operands)
            kept.append(node)
    return graph.with_nodes(tuple(reversed(kept)))


def is_column(form: Form) -> bool:
    """Whether the reduced axis strides through memory while the last kept axis runs along it."""
    if not form.axes or not form.raxes:
        return False
    kept, reduced = form.axes[-1][0], form.raxes[-1][0]
    along_kept = along_reduced = 0
    for load in ex.loads(form.expr):
        along_reduced += coefficient(load.index[0], reduced) == 1
        along_kept += coefficient(load.index[0], kept) == 1
    return along_kept > along_reduced


def natural_domain(form: Form) -> Domain:
    """The domain a loop would iterate alone. A long reduction to one value gets an axis that threads can share."""
    inner = tuple(size for _, size in form.raxes)
    if not form.axes and len(inner) == 1 and isinstance(inner[0], int) and inner[0] >= PARALLEL_WORK:
        chunk = next((c for c in range(LONGEST_CHUNK, SHORTEST_CHUNK - 1, -1) if inner[0] % c == 0), None)
        if chunk is not None:
            inner = (inner[0] // chunk, chunk)
    return Domain(tuple(size for _, size in form.axes), inner)


def _same(a: Size | sympy.Expr, b: Size | sympy.Expr) -> bool:
    return True if a is b else _equal(a, b)


@lru_cache(maxsize=65536)
def _equal(a: Size | sympy.Expr, b: Size | sympy.Expr) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def spread_of(form: Form, domain: Domain) -> str | None:
    """The role ``form`` would play in ``domain``, or None."""
    outer, inner = product(domain.outer), product(domain.inner)
    if isinstance(form.node, Reduction):
        return "fold" if domain.inner and _same(form.numel, outer) and _same(form.reduced, inner) else None
    if not domain.inner:
        return "outer" if _same(form.numel, outer) else None
    if _same(form.numel, outer * inner):
        return "row"
    return "outer" if _same(form.numel, outer) else None


def again(member: Member, domain: Domain) -> Member | None:
    """``member`` in another domain, not in columns; reductions of the columns of a strip stay that."""
    if member.spread != "strip":
        return make_member(member.placed.form, member.position, domain, column=False)
    placed = place(member.placed.form, domain, "strip")
    return None if placed is None else Member(member.position, "strip", placed)


def make_member(form: Form, position: int, domain: Domain, column: bool) -> Member | None:
    spread = spread_of(form, domain)
    if spread is None or (column and spread == "row"):
        return None
    placed = place(form, domain, spread)
    return None if placed is None else Member(position, spread, placed)


@dataclass
class _Unit:
    """Working state of one future node: a group, or a single non-loop node."""

    positions: list[int]
    group: Group | None = None
    ancestors: int = 0
    touches: set[str] = field(default_factory=set)


class _Grouping:
    """Greedy grouping in program order with exact cycle checks on transitive ancestor sets."""

    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.graph = graph
        self.ctx = ctx
        self.before = predecessors(graph)
        self.roots = storage_roots(graph)
        self.units: list[_Unit] = []
        self.unit_of: list[int] = []
        self.readers: dict[str, list[int]] = {}

    def add(self, position: int) -> None:
        node = self.graph.nodes[position]
        direct = {self.unit_of[p] for p in self.before[position]}
        if isinstance(node, Pointwise | Reduction | Store):
            form = form_of(self.graph, node)
            for unit in self._candidates(node, direct):
                grown = self._join(self.units[unit], form, position, unit, direct)
                if grown is not None:
                    self._merge(unit, grown, position, direct)
                    for other in self._candidates(node, direct):
                        if other != unit:
                            self._absorb(unit, other)
                    return
            column = isinstance(node, Reduction) and is_column(form)
            domain = natural_domain(form)
            member = make_member(form, position, domain, column)
            if member is None:
                raise CompilerBug(f"{node.out.name} does not fit its own domain {domain}")
            self._new_unit(position, direct, Group(domain, column, (member,)))
        else:
            self._new_unit(position, direct, None)

    def _new_unit(self, position: int, direct: set[int], group: Group | None) -> None:
        unit = len(self.units)
        ancestors = 0
        for other in direct:
            ancestors |= self.units[other].ancestors | 1 << other
        touches = self._touches(position) if group is not None else set()
        self.units.append(_Unit([position], group, ancestors, touches))
        self.unit_of.append(unit)
        for name in touches:
            self.readers.setdefault(name, []).append(unit)

    def _touches(self, position: int) -> set[str]:
        node = self.graph.nodes[position]
        return set(node.operands) | {d.name for d in node.defs}

    def _candidates(self, node: Node, direct: set[int]) -> list[int]:
        """Groups that share a buffer with ``node``, those sharing most bytes first, then the latest."""
        shared: dict[int, int] = {}
        for name in node.operands:
            value = self.graph.defs[name]
            nbytes = hint(getattr(value, "nbytes", 0), self.graph.size_hints)
            for unit in self.readers.get(name, ()):
                shared[unit] = shared.get(unit, 0) + nbytes
        ranked = sorted((u for u in shared if self.units[u].group), key=lambda unit: (-shared[unit], -unit))
        return ranked[:MAX_CANDIDATES]

    def _join(self, unit: _Unit, form: Form, position: int, number: int, direct: set[int]) -> Group | None:
        """The group with ``form`` in it, or None with a verdict."""
        assert unit.group is not None
        bit = 1 << number
        if any(other != number and self.units[other].ancestors & bit for other in direct):
            self._refuse(form, unit, "another node stands between them")
            return None
        if len(unit.touches | self._touches(position)) > MAX_BUFFERS:
            self._refuse(form, unit, f"more than {MAX_BUFFERS} buffers")
            return None
        group, node = unit.group, form.node
        column = group.column
        if isinstance(node, Reduction):
            column = is_column(form)
            if group.domain.inner and column != group.column:
                self._refuse(form, unit, "one reduces along rows, the other along columns")
                return None
        elif self._device(node) != self._device(group.members[0].placed.form.node):
            self._refuse(form, unit, "different devices")
            return None
        for domain in self._domains(group, form):
            members = [make_member(m.placed.form, m.position, domain, column) for m in group.members]
            new = make_member(form, position, domain, column)
            if new is None or any(m is None for m in members):
                continue
            placed = tuple(m for m in members if m is not None)
            if self._consistent(placed, new):
                return Group(domain, column, (*placed, new))
        self._refuse(form, unit, "their iterations do not line up")
        return None

    def _absorb(self, number: int, other: int) -> None:
        """Unite two groups that a common member has brought together, if all their members may be in one group."""
        unit, rival = self.units[number], self.units[other]
        group, joining = unit.group, rival.group
        if group is None or joining is None or group.column != joining.column:
            return
        if len(unit.touches | rival.touches) > MAX_BUFFERS or self._path_between(number, other):
            return
        forms = sorted((*group.members, *joining.members), key=lambda m: m.position)
        for domain in dict.fromkeys((group.domain, joining.domain)):
            members: list[Member] = []
            for old in forms:
                new = make_member(old.placed.form, old.position, domain, group.column)
                if new is None or not self._consistent(members, new):
                    break
                members.append(new)
            else:
                self._unite(number, other, Group(domain, group.column, tuple(members)))
                return

    def form_strips(self) -> None:
        """Unite reductions of columns with the loops over rows that share most bytes with them."""
        for number, unit in enumerate(self.units):
            group = unit.group
            if group is None or not group.column or not group.domain.inner or len(group.domain.outer) < 2:
                continue
            if self._device(group.members[0].placed.form.node) != "cuda":
                continue
            shared: dict[int, int] = {}
            for name in unit.touches:
                value = self.graph.defs[name]
                for other in self.readers.get(name, ()):
                    if other != number and self.units[other].group is not None:
                        shared[other] = shared.get(other, 0) + hint(getattr(value, "nbytes", 0), self.graph.size_hints)
            for other in sorted(shared, key=lambda o: (-shared[o], o)):
                if self._make_strips(other, number):
                    break

    def _make_strips(self, number: int, columns: int) -> bool:
        rows, joining = self.units[number].group, self.units[columns].group
        assert rows is not None
        assert joining is not None
        if len(self.units[number].touches | self.units[columns].touches) > MAX_BUFFERS:
            return False
        if self._path_between(number, columns) or self.units[number].ancestors >> columns & 1:
            return False
        group = strip_group(rows, joining, again)
        if group is None:
            return False
        seen: list[Member] = []
        for member in group.members:
            if not self._consistent(seen, member):
                return False
            seen.append(member)
        self._unite(number, columns, group)
        self.ctx.verdict("fuse", joining.members[0].name, f"in strips with {rows.members[-1].name}", "read once")
        return True

    def _path_between(self, a: int, b: int) -> bool:
        """Whether a third unit lies on a path from one to the other."""
        for start, end in ((a, b), (b, a)):
            middle = self.units[end].ancestors & ~(1 << start)
            while middle:
                low = middle & -middle
                if self.units[low.bit_length() - 1].ancestors & 1 << start:
                    return True
                middle ^= low
        return False

    def _unite(self, number: int, other: int, group: Group) -> None:
        unit, rival = self.units[number], self.units[other]
        unit.group = group
        unit.positions = sorted((*unit.positions, *rival.positions))
        unit.touches |= rival.touches
        both = 1 << number | 1 << other
        unit.ancestors = (unit.ancestors | rival.ancestors) & ~both
        for position in rival.positions:
            self.unit_of[position] = number
        for name in rival.touches:
            self.readers[name] = list(dict.fromkeys(number if u == other else u for u in self.readers[name]))
        rival.group, rival.positions, rival.ancestors = None, [], 0
        for third in self.units:
            if third.ancestors & both:
                third.ancestors |= unit.ancestors | both

    def _device(self, node: Node) -> str:
        return str(getattr(node.defs[0], "device", ""))

    def _refuse(self, form: Form, unit: _Unit, reason: str) -> None:
        assert unit.group is not None
        other = unit.group.members[-1].placed.form.node.out.name
        self.ctx.verdict("fuse", form.node.out.name, f"not fused with {other}", reason)

    def _domains(self, group: Group, form: Form) -> list[Domain]:
        """Domains that might hold both: the group's, the loop's own, and the loop's axes split at the group's inner."""
        found = [group.domain]
        own = natural_domain(form)
        if own.inner or not group.domain.inner:
            found.append(own)
        if group.domain.inner and not own.inner:
            for cut in range(len(own.outer)):
                if _same(product(own.outer[cut:]), product(group.domain.inner)):
                    found.append(Domain(own.outer[:cut], own.outer[cut:]))
        return list(dict.fromkeys(found))

    def _consistent(self, members: Sequence[Member], new: Member) -> bool:
        """Every access between ``new`` and the members is to the position being processed."""
        by_name = {name: m for m in members for name in m.names}
        node = new.placed.form.node
        for load in new.loads():
            source = by_name.get(load.buffer)
            if source is None:
                continue
            if source.spread == "row" and new.spread == "outer":
                return False
            if load.bind or not _same(load.index[0], source.placed.address):
                return False
        return all(self._stores_agree(member, new) for member in members) and not (
            isinstance(node, Store) and (node.bind or node.mode != "set")
        )

    def _stores_agree(self, member: Member, new: Member) -> bool:
        """Where one writes into a storage the other reads or writes, both do it at the position being processed."""
        for writer, other in ((member, new), (new, member)):
            if not isinstance(writer.placed.form.node, Store):
                continue
            if writer.placed.bind or writer.placed.form.node.mode != "set":
                return False
            root = self.roots[writer.name]
            if any(self.roots[name] == root for name in other.names):
                return False
            for load in other.loads():
                if self.roots[load.buffer] == root and (
                    writer.spread != other.spread or not _same(load.index[0], writer.placed.address)
                ):
                    return False
        return True

    def _merge(self, number: int, group: Group, position: int, direct: set[int]) -> None:
        unit = self.units[number]
        added = 0
        for other in direct:
            if other != number:
                added |= self.units[other].ancestors | 1 << other
        unit.group = group
        unit.positions.append(position)
        new = self._touches(position) - unit.touches
        unit.touches |= new
        for name in new:
            self.readers.setdefault(name, []).append(number)
        self.unit_of.append(number)
        unit.ancestors |= added
        bit = 1 << number
        for other_unit in self.units:
            if other_unit.ancestors & bit:
                other_unit.ancestors |= added

    def nodes_in_order(self) -> tuple[Node, ...]:
        """The nodes of all units, in dependence order, ties by program order."""
        waiting: list[set[int]] = [set() for _ in self.units]
        followers: list[set[int]] = [set() for _ in self.units]
        for position, before in enumerate(self.before):
            unit = self.unit_of[position]
            for p in before:
                if self.unit_of[p] != unit:
                    waiting[unit].add(self.unit_of[p])
                    followers[self.unit_of[p]].add(unit)
        live = [n for n, unit in enumerate(self.units) if unit.positions]
        ready = [(self.units[n].positions[0], n) for n in live if not waiting[n]]
        heapq.heapify(ready)
        nodes: list[Node] = []
        placed = 0
        while ready:
            _, number = heapq.heappop(ready)
            placed += 1
            nodes += self._nodes(self.units[number])
            for follower in followers[number]:
                waiting[follower].discard(number)
                if not waiting[follower]:
                    heapq.heappush(ready, (self.units[follower].positions[0], follower))
        if placed != len(live):
            raise CompilerBug("fusion made a cycle")
        return tuple(nodes)

    def _nodes(self, unit: _Unit) -> tuple[Node, ...]:
        if unit.group is None:
            node = self.graph.nodes[unit.positions[0]]
            return scan_kernels(self.graph, node, self.ctx) if isinstance(node, Scan) else (node,)
        inside = set(unit.positions)
        needed = {
            name
            for m in unit.group.members
            for name in m.names
            if isinstance(m.placed.form.node, Store)
            or name in self.graph.output_names
            or any(user not in inside for user in self.graph.users[name])
        }
        return (emit_kernel(self.graph, unit.group, needed),)
