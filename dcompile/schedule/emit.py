"""A fusion group written down as a Kernel: which loop each member runs in, and what is kept between loops.

For each outer position the inner range is traversed in passes: a value that needs a finished reduction runs in a later
pass than that reduction. A row value needed in a later pass than its own is reloaded from memory if it is stored there
anyway, recomputed if that is cheap, and kept in scratch memory otherwise.

A group in strips (``schedule.strips``) cuts its rows into strips. The rows of one strip run in order, and reductions of
columns go on in scratch memory meanwhile, one value a column; each strip ends by writing these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from dcompile.analyse.alias import storage_roots
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import product
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Role, Scratch, Stmt, Write, bound_axes
from dcompile.ir.nodes import Axis, Reduction, Store
from dcompile.ir.types import Origin, Size, Value
from dcompile.schedule.group import Group, Member
from dcompile.schedule.loops import coefficient, index_parts
from dcompile.schedule.strips import continued, in_strips
from dcompile.schedule.tile import tiled
from dcompile.schedule.unroll import Values, at_position, inner_positions, left_fold, unrollable

PARALLEL_WORK = 32768
"""Iterations from which a kernel is worth several threads: waking an OpenMP team costs 2 to 5 us, the time in which
one core runs about this many vectorised iterations."""

SCRATCH_BYTES = 32768
"""Most bytes of one row kept in scratch: the size of a first-level data cache, beyond which memory is as good."""

RECOMPUTE_FLOPS = 4
"""Row values of at most this many operations are recomputed in a later pass: about the cost of a store and a load in
first-level cache."""


GPU_RECOMPUTE_FLOPS = 64
"""The same on a GPU for rows too long for scratch, which would go through memory: arithmetic of 30 to 60 operations
takes an H100 as long as storing an f32 and loading it again."""


def emit_kernel(graph: Graph, group: Group, needed: set[str]) -> Kernel:
    """The kernel of ``group``; ``needed`` names the members whose values others read from memory."""
    return _Emitter(graph, group, set(needed)).kernel()


@dataclass
class _Emitter:
    graph: Graph
    group: Group
    stored: set[str]
    by_name: dict[str, Member] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, Scratch] = field(default_factory=dict)
    recomputed: set[str] = field(default_factory=set)

    def kernel(self) -> Kernel:
        self.by_name = {name: m for m in self.group.members for name in m.names}
        self.values = {value.name: value for m in self.group.members for value in m.outs}
        self._assign_passes()
        if not self.group.strips and unrollable(
            self.group.domain, [root for m in self.group.members for root in m.placed.roots]
        ):
            body = self._unrolled()
        else:
            self._keep_between_passes()
            body = self._rows() if self.group.domain.inner else self._flat()
        outs = [(m, value) for m in self.group.members for value in m.outs if value.name in self.stored]
        origin = Origin()
        for member in self.group.members:
            origin = origin | member.placed.form.node.origin
        return Kernel(
            outs=tuple(value for _, value in outs),
            body=body,
            targets=tuple(n.target if isinstance(n := m.placed.form.node, Store) else None for m, _ in outs),
            inplace=self._inplace([m for m, _ in outs]),
            origin=origin,
        )

    def _sources(self, member: Member) -> list[Member]:
        return [self.by_name[load.buffer] for load in member.loads() if load.buffer in self.by_name]

    def _assign_passes(self) -> None:
        """Earliest pass of every member; row members that only feed later passes move to the first that needs them."""
        users: dict[str, list[Member]] = {}
        for member in self.group.members:
            earliest = 0
            for source in self._sources(member):
                users.setdefault(source.name, []).append(member)
                earliest = max(earliest, self.passes[source.name] + (source.spread == "fold"))
            self.passes[member.name] = earliest
        for member in reversed(self.group.members):
            mine = users.get(member.name)
            if member.spread == "row" and mine:
                self.passes[member.name] = max(self.passes[member.name], min(self.passes[u.name] for u in mine))

    def _keep_between_passes(self) -> None:
        inner_size = product(self.group.domain.inner)
        for member in self.group.members:
            if member.spread != "row" or member.name in self.stored:
                continue
            own = self.passes[member.name]
            later = any(
                self.passes[user.name] > own
                for user in self.group.members
                if any(load.buffer == member.name for load in user.loads())
            )
            if not later:
                continue
            feeds = [s for s in self._sources(member) if s.spread == "row"]
            small = isinstance(inner_size, int) and inner_size * member.out.dtype.itemsize <= SCRATCH_BYTES
            cheap = ex.flops(member.placed.expr) <= RECOMPUTE_FLOPS
            if not feeds and (cheap or (not small and self._cheaper_again(member))):
                self.recomputed.add(member.name)
            elif small and isinstance(inner_size, int):
                self.scratch[member.name] = Scratch(f"{member.name}_row", member.out.dtype, inner_size)
            else:
                self.stored.add(member.name)

    def _cheaper_again(self, member: Member) -> bool:
        """Whether a GPU evaluates a long row again faster than it stores and loads it."""
        if member.out.device != "cuda" or ex.flops(member.placed.expr) > GPU_RECOMPUTE_FLOPS:
            return False
        inner = {var for var, _ in self.group.domain.inner_axes}
        loaded = {(load.buffer, load.index): load for load in member.loads() if inner & _variables(load)}
        return sum(load.dtype.itemsize for load in loaded.values()) <= 2 * member.out.dtype.itemsize

    def _body(self, member: Member, number: int) -> ex.Expr:
        return self._local(member.placed.expr, number)

    def _local(self, root: ex.Expr, number: int) -> ex.Expr:
        """``root`` as evaluated in pass ``number``: values of this group are locals, scratch or reloaded memory."""

        def leaf(node: ex.Expr) -> ex.Expr | None:
            if not isinstance(node, ex.Load) or node.buffer not in self.by_name:
                return None
            source = self.by_name[node.buffer]
            if source.spread != "row" or self.passes[source.name] == number:
                return ex.local(node.buffer, self.values[node.buffer].dtype)
            if source.name in self.recomputed:
                return self._local(_typed(source.placed.expr, source.out), number)
            if source.name in self.scratch:
                return ex.load(self.scratch[source.name].name, (self._inner_position(),), source.out.dtype)
            return ex.load(source.name, (source.placed.address,), source.out.dtype)

        return ex.transform(root, leaf)

    def _inner_position(self) -> sympy.Expr:
        flat: sympy.Expr = sympy.Integer(0)
        for var, size in self.group.domain.inner_axes:
            flat = flat * size + var
        return sympy.expand(flat)

    def _lets_and_writes(self, members: list[Member], number: int) -> tuple[tuple[Let, ...], tuple[Write, ...]]:
        lets = tuple(Let(_evaluated(m), _typed(self._body(m, number), m.out)) for m in members)
        writes: list[Write] = []
        for m in members:
            value = ex.local(_evaluated(m), m.out.dtype)
            if m.spread == "strip":
                writes.append(continued(m, value, self._inner_position()))
                continue
            if m.name in self.stored:
                node = m.placed.form.node
                mode = node.mode if isinstance(node, Store) else "set"
                bind = tuple(self._local(b, number) for b in m.placed.bind)
                writes.append(Write(m.name, m.placed.address, value, bind, mode))
            if m.name in self.scratch:
                writes.append(Write(self.scratch[m.name].name, self._inner_position(), value))
        return lets, tuple(writes)

    def _flat(self) -> tuple[Stmt, ...]:
        lets, writes = self._lets_and_writes(list(self.group.members), 0)
        axes = self.group.domain.outer_axes
        if not axes:
            return (*lets, *writes)
        nest = Nest(axes, self._flat_roles(axes, writes), (*lets, *writes))
        return (tiled(nest) if all(w.mode == "set" and not w.bind for w in writes) else nest,)

    def _flat_roles(self, axes: tuple[Axis, ...], writes: tuple[Write, ...]) -> tuple[Role, ...]:
        """Accumulating writes run in order (so sums do not depend on thread timing), with lanes only where the lanes
        write to different addresses, and on threads of a CPU only where positions of the first axis never share an
        address; everything else runs in parallel with lanes along the last axis."""
        last = axes[-1][0]
        moving = [w for w in writes if w.mode == "add" or w.bind]
        inner = Role.SERIAL if any(_meets_itself(w, last) for w in moving) else Role.SIMD
        if not moving:
            return (self._outer_role(),) * (len(axes) - 1) + (inner,)
        roles = [Role.SERIAL] * (len(axes) - 1) + [inner]
        if len(axes) > 1 and self._on_cpu() and all(_stays_apart(w, axes) for w in moving):
            roles[0] = self._outer_role()
        return tuple(roles)

    def _on_cpu(self) -> bool:
        return all(member.out.device == "cpu" for member in self.group.members)

    def _rows(self) -> tuple[Stmt, ...]:
        members, inner = self.group.members, self.group.domain.inner_axes
        inner_roles = self._inner_roles(len(inner))
        last = max(self.passes.values()) + 1
        body: list[Stmt] = list(self.scratch.values())
        for number in range(last + 1):
            outer = [m for m in members if m.spread == "outer" and self.passes[m.name] == number]
            lets, writes = self._lets_and_writes(outer, number)
            body += [*lets, *writes]
            rows = [m for m in members if m.spread in ("row", "strip") and self.passes[m.name] == number]
            folds = [m for m in members if m.spread == "fold" and self.passes[m.name] == number]
            lets, writes = self._lets_and_writes(rows, number)
            if folds:
                body.append(self._fold(folds, lets, writes, inner, inner_roles, number))
                body += self._finished(folds)
            elif rows:
                body.append(Nest(inner, inner_roles, (*lets, *writes)))
        axes = self.group.domain.outer_axes
        if not axes:
            return tuple(body)
        if self.group.strips:
            return (in_strips(self.group, tuple(body), inner_roles, self._inner_position()),)
        roles = (self._outer_role(),) * len(axes)
        if self.group.column:
            roles = (*roles[:-1], Role.SIMD)
        return (Nest(axes, roles, tuple(body)),)

    def _unrolled(self) -> tuple[Stmt, ...]:
        """Straight-line code for one outer position: everything is evaluated, then everything is written."""
        places = list(inner_positions(self.group.domain.inner))
        values: Values = {}
        lets: list[Let] = []
        writes: list[Write] = []

        def define(name: str, value: ex.Expr, out: Value) -> ex.Expr:
            lets.append(Let(name, _typed(value, out)))
            return ex.local(name, out.dtype)

        for m in self.group.members:
            node = m.placed.form.node
            if isinstance(node, Reduction):
                entering = [
                    tuple(at_position(e, place, n, values) for e in (m.placed.expr, *m.placed.others))
                    for n, place in enumerate(places)
                ]
                folded, results = left_fold(node, entering, f"{m.name}_fold")
                lets += folded
                values.update({out.name: (define(out.name, e, out),) for out, e in zip(m.outs, results, strict=True)})
            else:
                here = places if m.spread == "row" else [{}]
                found = (at_position(m.placed.expr, place, n, values) for n, place in enumerate(here))
                values[m.name] = tuple(
                    define(f"{m.name}_{n}" if len(here) > 1 else m.name, e, m.out) for n, e in enumerate(found)
                )
            for out in m.outs:
                if out.name in self.stored:
                    writes += self._unrolled_writes(m, out, values, places)
        axes = self.group.domain.outer_axes
        return (Nest(axes, self._flat_roles(axes, tuple(writes)), (*lets, *writes)),)

    def _unrolled_writes(
        self, m: Member, out: Value, values: Values, places: list[dict[sympy.Symbol, sympy.Expr]]
    ) -> list[Write]:
        found: list[Write] = []
        node = m.placed.form.node
        mode = node.mode if isinstance(node, Store) else "set"
        for n, (value, place) in enumerate(zip(values[out.name], places, strict=False)):
            bind = tuple(at_position(b, place, n, values) for b in m.placed.bind)
            found.append(Write(out.name, m.placed.address.xreplace(place), value, bind, mode))
        return found

    def _inner_roles(self, count: int) -> tuple[Role, ...]:
        """Lanes along the last inner axis, unless columns have them; threads along the first if nothing is outside."""
        if self.group.column:
            return (Role.SERIAL,) * count
        first = Role.SERIAL if self.group.domain.outer else self._outer_role()
        return (first,) * (count > 1) + (Role.SERIAL,) * (count - 2) + (Role.SIMD,)

    def _fold(
        self,
        folds: list[Member],
        lets: tuple[Let, ...],
        writes: tuple[Write, ...],
        inner: tuple[Axis, ...],
        roles: tuple[Role, ...],
        number: int,
    ) -> Fold:
        accumulators: list[Accumulator] = []
        for m in folds:
            node = m.placed.form.node
            assert isinstance(node, Reduction)
            name, *more = (f"{name}_acc" for name in m.names)
            others = tuple(self._local(e, number) for e in m.placed.others)
            accumulators.append(Accumulator(name, node.kind, self._body(m, number), tuple(more), others))
        return Fold(inner, roles, tuple(accumulators), lets, writes)

    def _finished(self, folds: list[Member]) -> list[Stmt]:
        """The results of finished reductions under their own names and dtypes, written where others need them."""
        found: list[Stmt] = []
        for m in folds:
            node = m.placed.form.node
            assert isinstance(node, Reduction)
            accumulated = Accumulator(f"{m.name}_acc", node.kind, m.placed.expr).dtype
            for value in m.outs:
                found.append(Let(value.name, ex.to(ex.local(f"{value.name}_acc", accumulated), value.dtype)))
        for m in folds:
            for value in m.outs:
                if value.name in self.stored:
                    found.append(Write(value.name, m.placed.address, ex.local(value.name, value.dtype)))
        return found

    def _outer_role(self) -> Role:
        work: Size = product(self.group.domain.outer) * product(self.group.domain.inner)
        big = hint(work, self.graph.size_hints) >= PARALLEL_WORK
        return Role.PARALLEL if big else Role.SERIAL

    def _inplace(self, outs: list[Member]) -> tuple[tuple[str, str], ...]:
        """Pairs of an out and an operand that is only read at the address the out is about to be written to."""
        if self.group.column:
            return ()
        roots = storage_roots(self.graph)
        written = {roots[n.target] for m in outs if isinstance(n := m.placed.form.node, Store)}
        pairs: list[tuple[str, str]] = []
        for out in outs:
            node = out.placed.form.node
            if isinstance(node, Store | Reduction):
                continue
            for name in dict.fromkeys(load.buffer for member in self.group.members for load in member.loads()):
                free = name not in self.by_name and roots[name] not in written
                if free and self._reads_only_here(name, out):
                    pairs.append((out.name, name))
        return tuple(pairs)

    def _reads_only_here(self, name: str, out: Member) -> bool:
        value = self.graph.value(name)
        if value.dtype.itemsize != out.out.dtype.itemsize:
            return False
        for member in self.group.members:
            for load in member.loads():
                if load.buffer != name:
                    continue
                late = self._last_pass(member) > self.passes[out.name]
                spread = "row" if member.spread == "strip" else member.spread
                elsewhere = load.bind or load.index[0] != out.placed.address or spread != out.spread
                if late or (elsewhere and not (member.spread == "fold" and load.index[0] == out.placed.address)):
                    return False
        return True

    def _last_pass(self, member: Member) -> int:
        """The last pass that evaluates ``member``: recomputed members run again wherever they are used."""
        last = self.passes[member.name]
        if member.name in self.recomputed:
            for user in self.group.members:
                if any(load.buffer == member.name for load in user.loads()):
                    last = max(last, self._last_pass(user))
        return last


def _evaluated(m: Member) -> str:
    """The local that holds its value at one position; that of a reduction of columns is one element of many."""
    return f"{m.name}_element" if m.spread == "strip" else m.name


def _variables(load: ex.Load) -> set[sympy.Symbol]:
    return {symbol for index in load.index for symbol in index.free_symbols} | {
        symbol for b in load.bind for inner in ex.loads(b) for symbol in _variables(inner)
    }


def _typed(body: ex.Expr, out: Value) -> ex.Expr:
    return ex.to(body, out.dtype)


def _stays_apart(write: Write, axes: tuple[Axis, ...]) -> bool:
    """Whether two positions along the first of ``axes`` never write the same address."""
    data = bound_axes(write)
    step = coefficient(write.address, axes[0][0])
    if data is None or step is None or not step.is_Integer:
        return False
    reach: sympy.Expr = sympy.Integer(0)
    for var, size in (*axes[1:], *data):
        stride = coefficient(write.address, var)
        if stride is None or not stride.is_Integer or not isinstance(size, int):
            return False
        reach += abs(stride) * max(size - 1, 0)
    return bool(abs(step) > reach)


def _meets_itself(write: Write, last: sympy.Symbol) -> bool:
    """Whether two lanes along ``last`` may write the same address."""
    step = coefficient(write.address, last)
    fixed = all(last not in e.free_symbols for b in write.bind for e in index_parts(b))
    return step is None or step == 0 or not fixed
