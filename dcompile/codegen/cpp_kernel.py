"""Statements of a kernel as C++ loops, word for word: roles become OpenMP pragmas, nothing is rearranged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import sympy

from dcompile.codegen.cpp_draws import Drawn, drawn_loop, draws_along, take
from dcompile.codegen.cpp_expr import load_text, store_text
from dcompile.codegen.cpp_fold import Folding
from dcompile.codegen.cpp_loops import (
    at_least_one,
    block_level,
    block_size,
    block_step,
    conflicts,
    error_clause,
    for_text,
    injective,
    row_major,
    splits,
    volume,
)
from dcompile.codegen.cpp_scan import scan_loop
from dcompile.codegen.cpp_scope import Emitter
from dcompile.codegen.cpp_strip import StripPrinter
from dcompile.codegen.cpp_types import literal, register_type, storage_type
from dcompile.codegen.cpp_welford import SAMPLES, ShiftedMoments, folding
from dcompile.ir.index import as_expr
from dcompile.ir.kernel import Fold, Let, Nest, Role, ScanLoop, Scratch, Stmt, Write, bound_axes, expressions
from dcompile.ir.nodes import Axis
from dcompile.ir.types import Size

Emit = Callable[[], None]

GRAIN = 32768
"""Loop iterations below which a nest stays on one thread: waking the OpenMP team costs about 5 us, the time one core
needs for as many cheap elements. Eager PyTorch uses the same number."""

PIECE = 4096
"""Iterations of a simd loop that one thread takes at a time. The loop over pieces is the one that is spread: GCC 12 ran
the combined form, ``parallel for simd``, six times slower (gelu of 4 M elements: 21 ms against 3.5 ms)."""

CHUNKS = 64
"""Partial results of a fold spread over threads. Fixed, so that the result does not depend on the thread count."""


class Printer:
    """Prints the statements of one kernel through an ``Emitter``."""

    def __init__(self, out: Emitter) -> None:
        self.out = out
        self.threaded = False
        """Inside a loop that is spread over threads."""
        self.parallel: list[sympy.Symbol] = []
        """Variables of the loops spread over threads."""
        self.open_axes: list[Axis] = []
        """All loops around the current statement."""

    # straight-line statements

    def body(self, stmts: Sequence[Stmt]) -> None:
        for stmt in stmts:
            if isinstance(stmt, Nest):
                self.nest(stmt)
            elif isinstance(stmt, Fold):
                self.fold(stmt)
            elif isinstance(stmt, Let):
                self.let(stmt)
            elif isinstance(stmt, Write):
                self.write(stmt)
            elif isinstance(stmt, ScanLoop):
                scan_loop(self, stmt)
            else:
                self.scratch(stmt)

    def let(self, stmt: Let) -> None:
        self.out.bind_local(stmt.name, self.out.value(stmt.expr))

    def scratch(self, stmt: Scratch) -> None:
        name = self.out.fresh("m")
        self.out.line(f"alignas(64) {storage_type(stmt.dtype)} {name}[{max(stmt.size, 1)}];")
        self.out.bind_scratch(stmt.name, name, stmt.dtype, per_lane=False)

    def write(self, stmt: Write) -> None:
        value = self.out.value(stmt.expr)
        element = self.out.element(stmt.buffer, stmt.address, stmt.bind)
        dtype = self.out.buffers[stmt.buffer][1]
        if stmt.mode == "set":
            text = f"{element} = {store_text(value, dtype)};"
        elif self.threaded and not self._private(stmt):
            text = f"dc::atomic_add_{dtype.value}(&{element}, {value}, threads);"
        else:
            text = f"{element} = {store_text(f'{load_text(element, dtype)} + {value}', dtype)};"
        guard = self.out.not_empty(stmt.bind)
        self.out.line(f"if ({guard}) {text}" if guard else text)
        self.out.forget_changed()

    def _private(self, stmt: Write) -> bool:
        """Whether no two iterations of the surrounding loops write the same address."""
        data = bound_axes(stmt)
        return data is not None and injective(stmt.address, (*self.open_axes, *data), self.parallel)

    # nests

    def nest(self, stmt: Nest) -> None:
        axes, roles = list(stmt.axes), list(stmt.roles)
        if not axes:
            self._group(stmt.body)
            return
        leading = 0
        while not self.threaded and leading < len(axes) and roles[leading] is Role.PARALLEL:
            leading += 1
        simd = roles.index(Role.SIMD) if Role.SIMD in roles else len(axes)
        inner = stmt.body
        if simd + 1 < len(axes):
            inner = (Nest(tuple(axes[simd + 1 :]), tuple(roles[simd + 1 :]), inner),)
        work = volume(tuple(axes), stmt.body)
        if leading:
            head, middle = axes[:leading], axes[leading:simd]
            self._threads(head, work, lambda: self._plain(middle, lambda: self._innermost(axes, simd, inner, work)))
        else:
            self._plain(axes[:simd], lambda: self._innermost(axes, simd, inner, work))

    def _group(self, body: Sequence[Stmt]) -> None:
        with self.out.scope(certain=True) as inner:
            self.body(body)
        self.out.block("", inner)

    def _innermost(self, axes: list[Axis], simd: int, body: tuple[Stmt, ...], work: Size) -> None:
        if simd == len(axes):
            self.body(body)
        elif all(isinstance(s, Let | Write) for s in body):
            self._simd_loop(axes[simd], body, work, threads=simd == 0 and not self.threaded)
        else:
            StripPrinter(self).nest(axes[simd], body, work, threads=simd == 0 and not self.threaded)

    def _plain(self, axes: list[Axis], body: Emit) -> None:
        if not axes:
            body()
            return
        (var, extent), rest = axes[0], axes[1:]
        with self.out.scope(certain=at_least_one(extent)) as inner:
            text = self.enter(var, extent)
            self._plain(rest, body)
            self.open_axes.pop()
        self.out.block(for_text(text, "0", self.size(extent)), inner)

    def _threads(self, axes: list[Axis], work: Size, body: Emit) -> None:
        """Loops spread over threads; nothing may stand between them, so they share one scope."""
        clause = self.team(work)
        with self.out.scope(certain=all(at_least_one(extent) for _, extent in axes)) as inner:
            heads = [for_text(self.enter(var, extent), "0", self.size(extent)) for var, extent in axes]
            outer = self._spread(tuple(var for var, _ in axes), clause is not None)
            body()
            self.threaded, self.parallel = outer
            del self.open_axes[len(self.open_axes) - len(axes) :]
        if clause is not None:
            collapse = f" collapse({len(axes)})" if len(axes) > 1 else ""
            self.out.line(f"#pragma omp parallel for{collapse} schedule(static){clause}{error_clause(inner.lines)}")
        for head in heads[:-1]:
            self.out.line(head)
        self.out.block(heads[-1], inner)

    def _spread(self, variables: tuple[sympy.Symbol, ...], spread: bool) -> tuple[bool, list[sympy.Symbol]]:
        """Enter loops that run on several threads; returns what to restore afterwards."""
        before = (self.threaded, self.parallel)
        if spread:
            self.threaded, self.parallel = True, list(variables)
        return before

    def _simd_loop(self, axis: Axis, body: Sequence[Stmt], work: Size, threads: bool) -> None:
        extent = axis[1]
        clause = self.team(work) if threads else None
        if clause is None:
            self._lanes(axis, body, "0", self.size(extent))
            return
        with self.out.scope(certain=at_least_one(extent)) as inner:
            outer = self._spread((axis[0],), True)
            begin = self.out.fresh("k")
            self.out.line(f"const int64_t {begin}_end = dc::min_index({begin} + {PIECE}, {self.size(extent)});")
            self._lanes(axis, body, begin, f"{begin}_end")
            self.threaded, self.parallel = outer
        self.out.line(f"#pragma omp parallel for schedule(static){clause}{error_clause(inner.lines)}")
        self.out.block(f"for (int64_t {begin} = 0; {begin} < {self.size(extent)}; {begin} += {PIECE})", inner)

    def _lanes(self, axis: Axis, body: Sequence[Stmt], begin: str, end: str) -> None:
        """One simd loop, after the random numbers it takes."""
        if found := draws_along(self.out, expressions(tuple(body)), axis[0]):
            drawn_loop(self.out, axis, found, begin, end, partial(self._lane_loop, axis, body))
        else:
            self._lane_loop(axis, body, begin, end)

    def _lane_loop(self, axis: Axis, body: Sequence[Stmt], begin: str, end: str, drawn: Sequence[Drawn] = ()) -> None:
        """One simd loop, unless its lanes may add to one address: those go one after another."""
        var, extent = axis
        with self.out.scope(certain=at_least_one(extent)) as inner:
            text = self.enter(var, extent)
            take(self.out, drawn, text, begin)
            self.body(body)
            conflict = any(conflicts(s, var, self.open_axes) for s in body if isinstance(s, Write))
            self.open_axes.pop()
        if not conflict:
            self.out.line(f"#pragma omp simd{error_clause(inner.lines)}")
        self.out.block(for_text(text, begin, end), inner)

    # folds

    def fold(self, stmt: Fold) -> None:
        names = [self.out.fresh("v") for _ in stmt.accumulators]
        blocked = splits(stmt.axes, block_size(stmt.roles))
        folds = [folding(acc, name, blocked) for acc, name in zip(stmt.accumulators, names, strict=True)]
        for fold in folds:
            for variable in fold.variables:
                self.out.line(f"{variable.type} {fold.name}{variable.suffix} = {variable.start};")
        first = stmt.axes[0][1] if stmt.axes else 1
        clause = None
        if not self.threaded and stmt.roles and stmt.roles[0] is Role.PARALLEL:
            clause = self.team(volume(stmt.axes, stmt.lets))
        if clause is None:
            self._fold_range(stmt, folds, "0", self.size(first))
        else:
            self._fold_chunks(stmt, folds, clause)
        for acc, fold in zip(stmt.accumulators, folds, strict=True):
            for name, result in zip(acc.names, fold.results(), strict=True):
                if result != fold.name:
                    self.out.line(f"const {register_type(acc.dtype)} {(done := self.out.fresh('t'))} = {result};")
                    result = done
                self.out.bind_local(name, result)

    def _fold_chunks(self, stmt: Fold, folds: list[Folding], clause: str) -> None:
        """The first axis in ``CHUNKS`` pieces, one partial result each, combined in order."""
        extent = self.size(stmt.axes[0][1])
        chunk = self.out.fresh("c")
        for fold in folds:
            for variable in fold.variables:
                self.out.line(f"{variable.type} {fold.name}_part{variable.suffix}[{CHUNKS}];")
        with self.out.scope(certain=False) as inner:
            outer = self._spread((stmt.axes[0][0],), True)
            parts = [folding(fold.acc, fold.name + "_own", fold.blocked) for fold in folds]
            for part in parts:
                for variable in part.variables:
                    self.out.line(f"{variable.type} {part.name}{variable.suffix} = {variable.start};")
            for name, c in ((f"{chunk}_begin", chunk), (f"{chunk}_end", f"({chunk} + 1)")):
                share = f"{extent} / {CHUNKS} * {c} + dc::min_index({c}, {extent} % {CHUNKS})"
                self.out.line(f"const int64_t {name} = {share};")
            self._fold_range(stmt, parts, f"{chunk}_begin", f"{chunk}_end")
            for fold, part in zip(folds, parts, strict=True):
                for variable in part.variables:
                    self.out.line(f"{fold.name}_part{variable.suffix}[{chunk}] = {part.name}{variable.suffix};")
            self.threaded, self.parallel = outer
        self.out.line(f"#pragma omp parallel for schedule(static){clause}{error_clause(inner.lines)}")
        self.out.block(for_text(chunk, "0", str(CHUNKS)), inner)
        with self.out.scope(certain=True) as merge:
            for fold in folds:
                for text in fold.merge(fold.name + "_part", f"[{chunk}]"):
                    self.out.line(text)
        self.out.block(for_text(chunk, "0", str(CHUNKS)), merge)

    def _fold_range(self, stmt: Fold, folds: list[Folding], begin: str, end: str) -> None:
        """The loops of a fold, the first axis from ``begin`` to ``end``."""
        if not stmt.axes:
            self._fold_element(stmt, folds)
            return
        level = block_level(stmt.axes, block_size(stmt.roles)) if any(fold.blocked for fold in folds) else None
        self._fold_axis(stmt, folds, 0, level, begin, end)

    def _fold_axis(self, stmt: Fold, folds: list[Folding], level: int, split: int | None, begin: str, end: str) -> None:
        if level == split:
            self._fold_block(stmt, folds, level, begin, end)
            return
        axis, last = stmt.axes[level], level + 1 == len(stmt.axes)
        simd = last and stmt.roles[level] is Role.SIMD
        if simd and (found := draws_along(self.out, expressions((stmt,)), axis[0])):
            loop = partial(self._fold_loop, stmt, folds, level, split)
            drawn_loop(self.out, axis, found, begin, end, loop)
        else:
            self._fold_loop(stmt, folds, level, split, begin, end)

    def _fold_loop(
        self,
        stmt: Fold,
        folds: list[Folding],
        level: int,
        split: int | None,
        begin: str,
        end: str,
        drawn: Sequence[Drawn] = (),
    ) -> None:
        var, extent = stmt.axes[level]
        last = level + 1 == len(stmt.axes)
        with self.out.scope(certain=at_least_one(extent) and begin == "0") as inner:
            text = self.enter(var, extent)
            take(self.out, drawn, text, begin)
            if last:
                self._fold_element(stmt, folds)
            else:
                self._fold_axis(stmt, folds, level + 1, split, "0", self.size(stmt.axes[level + 1][1]))
            self.open_axes.pop()
        if last and stmt.roles[level] is Role.SIMD:
            self._fold_pragma(stmt, folds, inner.lines)
        self.out.block(for_text(text, begin, end), inner)

    def _fold_block(self, stmt: Fold, folds: list[Folding], level: int, begin: str, end: str) -> None:
        """``level`` in blocks; sums of a block start at zero and enter the total at its end."""
        step = block_step(stmt.axes, level, block_size(stmt.roles))
        start = self.out.fresh("k")
        with self.out.scope(certain=at_least_one(stmt.axes[level][1]) and begin == "0") as inner:
            for fold in folds:
                if fold.blocked:
                    for variable in fold.inner:
                        self.out.line(f"{variable.type} {fold.name}{variable.suffix} = {variable.start};")
            self.out.line(f"const int64_t {start}_end = dc::min_index({start} + {step}, {end});")
            moments = [fold for fold in folds if isinstance(fold, ShiftedMoments)]
            for fold in moments:
                self._choose_shift(stmt, fold, level, start)
            self._fold_axis(stmt, folds, level, None, start, f"{start}_end")
            self._close_moments(stmt, moments, level, start)
            for fold in folds:
                if fold.blocked and fold not in moments:
                    self.out.scopes[-1].lines.extend(fold.close_block())
        self.out.block(f"for (int64_t {start} = {begin}; {start} < {end}; {start} += {step})", inner)

    def _choose_shift(self, stmt: Fold, fold: ShiftedMoments, level: int, start: str) -> None:
        """The running mean, or the mean of a few elements of the block where there is none yet."""
        first = f"({fold.type}){fold.name}_mean" if fold.several else literal(0, fold.dtype)
        self.out.line(f"{fold.type} {fold.shift} = {first};")
        with self.out.scope(certain=False) as inner:
            head = self.enter_sample(stmt.axes[level:], start)
            for let in stmt.lets:
                self.let(let)
            self.out.line(fold.sample(self.out.value(fold.acc.expr)))
            del self.open_axes[len(self.open_axes) - len(stmt.axes[level:]) :]
        with self.out.scope(certain=False) as guarded:
            self.out.block(head, inner)
            self.out.line(fold.finite())
        self.out.block(f"if ({fold.name}_n == 0.0)" if fold.several else "", guarded)

    def enter_sample(self, axes: tuple[Axis, ...], start: str) -> str:
        """Open ``axes`` at a sampled position of the block from ``start``; gives the head of the loop over samples."""
        sample = self.out.fresh("k")
        for at, (var, extent) in enumerate(axes):
            text = self.enter(var, extent)
            place = f"{start} + ({start}_end - 1 - {start}) * {sample} / {SAMPLES - 1}" if at == 0 else "0"
            self.out.line(f"const int64_t {text} = {place};")
        return for_text(sample, "0", str(SAMPLES))

    def _close_moments(self, stmt: Fold, moments: list[ShiftedMoments], level: int, start: str) -> None:
        """Blocks whose shift lay far off are summed again, then all enter their totals."""
        if not moments:
            return
        several = any(fold.several for fold in moments)
        count = self.block_count(stmt.axes, level, start) if several else str(volume(stmt.axes, ()))
        with self.out.scope(certain=False) as inner:
            for fold in moments:
                self.out.scopes[-1].lines.extend(fold.again(count))
            only = replace(stmt, accumulators=tuple(fold.acc for fold in moments), writes=())
            self._fold_axis(only, list(moments), level, None, start, f"{start}_end")
        self.out.block(f"if ({' || '.join(fold.cancels(count) for fold in moments)})", inner)
        for fold in moments:
            self.out.scopes[-1].lines.extend(fold.close_counted(count))

    def block_count(self, axes: tuple[Axis, ...], level: int, start: str) -> str:
        """Elements of the block of axis ``level`` from ``start``."""
        return " * ".join([f"({start}_end - {start})", *(self.size(extent) for _, extent in axes[level + 1 :])])

    def _fold_pragma(self, stmt: Fold, folds: list[Folding], lines: list[str]) -> None:
        var = stmt.axes[-1][0]
        if any(not fold.clauses for fold in folds):
            return
        if any(conflicts(write, var, (*self.open_axes, *stmt.axes)) for write in stmt.writes):
            return
        clauses = " ".join(clause for fold in folds for clause in fold.clauses)
        self.out.line(f"#pragma omp simd {clauses}{error_clause(lines)}")

    def _fold_element(self, stmt: Fold, folds: list[Folding]) -> None:
        for let in stmt.lets:
            self.let(let)
        position = self.out.index(row_major(stmt.axes)) if any(fold.is_arg for fold in folds) else "0"
        for fold in folds:
            for text in fold.update([self.out.value(e) for e in fold.acc.exprs], position):
                self.out.line(text)
        for write in stmt.writes:
            self.write(write)

    # pieces

    def enter(self, var: sympy.Symbol, extent: Size) -> str:
        """Open a loop over ``var`` in the current scope; returns its C++ name."""
        text = self.out.fresh("i")
        self.out.bind_symbol(var, text)
        self.open_axes.append((var, extent))
        return text

    def size(self, extent: Size) -> str:
        """C++ text of a loop extent."""
        return self.out.index(as_expr(extent))

    def team(self, work: Size) -> str | None:
        """Clauses that spread a loop of ``work`` iterations over threads, or None if it always stays on one."""
        if isinstance(work, int):
            return " num_threads(threads) if(threads > 1)" if work > GRAIN else None
        return f" num_threads(threads) if(threads > 1 && {self.size(work)} > {GRAIN})"
