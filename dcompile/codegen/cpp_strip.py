"""Strips: a simd nest around folds or nests, statement by statement for a few lanes at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dcompile.codegen.cpp_fold import SERIAL_BLOCK, Folding
from dcompile.codegen.cpp_loops import (
    at_least_one,
    block_level,
    block_step,
    conflicts,
    error_clause,
    for_text,
    row_major,
    splits,
    volume,
)
from dcompile.codegen.cpp_scan import lane_scan
from dcompile.codegen.cpp_types import register_type, storage_type
from dcompile.codegen.cpp_welford import ShiftedMoments, folding
from dcompile.ir import expr as ex
from dcompile.ir.kernel import Fold, Let, Nest, ScanLoop, Scratch, Stmt, Write, expressions
from dcompile.ir.nodes import Axis
from dcompile.ir.types import Size

if TYPE_CHECKING:
    from dcompile.codegen.cpp_kernel import Printer

STRIP = 128
"""Lanes of a strip. Column sums of 4096 x 768, 512 x 50257 and 64 x 65536 f32 took 482, 14991 and 805 us with 64 lanes,
374, 13252 and 687 us with 128, and 424, 13614 and 1213 us with 256 (one Zen 4 core)."""


class StripPrinter:
    """Prints one strip-wise nest for a ``Printer``."""

    def __init__(self, printer: Printer) -> None:
        self.printer = printer
        self.out = printer.out
        self.lane_locals: dict[str, str] = {}
        """Locals with one value a lane, as C++ text that means something inside a loop over lanes only."""

    def nest(self, axis: Axis, body: Sequence[Stmt], work: Size, threads: bool) -> None:
        """The loop over strips of ``axis``, spread over threads if it is outermost."""
        self.axis, extent = axis, axis[1]
        out, printer = self.out, self.printer
        clause = printer.team(work) if threads else None
        count = printer.size(extent)
        self.first, self.lane = out.fresh("strip"), out.fresh("l")
        self.lanes = str(max(min(STRIP, extent), 1) if isinstance(extent, int) else STRIP)
        whole = isinstance(extent, int) and extent % int(self.lanes) == 0
        with out.scope(certain=at_least_one(extent)) as inner:
            outer = (printer.threaded, printer.parallel)
            if clause is not None:
                printer.threaded, printer.parallel = True, [axis[0]]
            self.width = self.lanes
            if not whole:
                self.width = f"{self.first}_lanes"
                out.line(f"const int64_t {self.width} = dc::min_index({count} - {self.first}, {self.lanes});")
            before, out.lane = out.lane, self.lane
            printer.open_axes.append(axis)
            self.body(body)
            printer.open_axes.pop()
            out.lane = before
            printer.threaded, printer.parallel = outer
        if clause is not None:
            out.line(f"#pragma omp parallel for schedule(static){clause}{error_clause(inner.lines)}")
        out.block(f"for (int64_t {self.first} = 0; {self.first} < {count}; {self.first} += {self.lanes})", inner)

    def body(self, stmts: Sequence[Stmt]) -> None:
        """Statements of the strip; neighbouring lets and writes share one loop over lanes."""
        group: list[Let | Write] = []
        for position, stmt in enumerate(stmts):
            if isinstance(stmt, Let | Write):
                group.append(stmt)
                continue
            self._flush(group, stmts[position:])
            group = []
            if isinstance(stmt, Fold):
                self.fold(stmt)
            elif isinstance(stmt, ScanLoop):
                lane_scan(self, stmt)
            elif isinstance(stmt, Nest):
                self._serial(list(stmt.axes), stmt.body)
            else:
                self.scratch(stmt)
        self._flush(group, ())

    def _flush(self, group: Sequence[Let | Write], later: Sequence[Stmt]) -> None:
        if not group:
            return
        kept = {e.name for root in expressions(tuple(later)) for e in ex.walk(root) if isinstance(e, ex.Local)}
        arrays = {}
        for stmt in group:
            if isinstance(stmt, Let) and stmt.name in kept:
                arrays[stmt.name] = self._array(register_type(stmt.expr.dtype), self.out.fresh("v"))

        def each() -> None:
            for stmt in group:
                if isinstance(stmt, Write):
                    self.printer.write(stmt)
                    continue
                self.printer.let(stmt)
                if stmt.name in arrays:
                    element = f"{arrays[stmt.name]}[{self.lane}]"
                    self.out.line(f"{element} = {self.out.value(ex.local(stmt.name, stmt.expr.dtype))};")

        simd = not any(conflicts(s, self.axis[0], self.printer.open_axes) for s in group if isinstance(s, Write))
        self.lane_loop(each, simd)
        for name, array in arrays.items():
            self.lane_locals[name] = f"{array}[{self.lane}]"

    def _array(self, ctype: str, name: str) -> str:
        self.out.line(f"alignas(64) {ctype} {name}[{self.lanes}];")
        return name

    def scratch(self, stmt: Scratch) -> None:
        """Memory of one iteration is memory of one lane: the lane is the last subscript."""
        name = self.out.fresh("m")
        self.out.line(f"alignas(64) {storage_type(stmt.dtype)} {name}[{max(stmt.size, 1)}][{self.lanes}];")
        self.out.bind_scratch(stmt.name, name, stmt.dtype, per_lane=True)

    def lane_loop(self, each: Callable[[], None], simd: bool = True, clause: str = "") -> None:
        """``each`` for every lane of the strip; ``clause`` joins what the lanes share."""
        out = self.out
        with out.scope(certain=at_least_one(self.axis[1])) as inner:
            text = out.fresh("i")
            out.bind_symbol(self.axis[0], text)
            for name, element in self.lane_locals.items():
                out.bind_local(name, element)
            out.line(f"const int64_t {text} = {self.first} + {self.lane};")
            each()
        if len(inner.lines) == 1:
            return
        if not any(_mentions(line, text) for line in inner.lines[1:]):
            del inner.lines[0]
        if simd:
            out.line(f"#pragma omp simd{clause}{error_clause(inner.lines)}")
        out.block(for_text(self.lane, "0", self.width), inner)

    def _serial(self, axes: list[Axis], body: Sequence[Stmt]) -> None:
        if not axes:
            self.body(body)
            return
        var, extent = axes[0]
        with self.out.scope(certain=at_least_one(extent)) as inner:
            text = self.printer.enter(var, extent)
            self._serial(axes[1:], body)
            self.printer.open_axes.pop()
        self.out.block(for_text(text, "0", self.printer.size(extent)), inner)

    # folds

    def fold(self, stmt: Fold) -> None:
        """A fold over serial axes with one accumulator a lane."""
        blocked = splits(stmt.axes, SERIAL_BLOCK)
        folds = [folding(acc, self.out.fresh("v"), blocked) for acc in stmt.accumulators]
        self.start([(fold.name + v.suffix, v.type, v.start) for fold in folds for v in fold.variables])
        level = block_level(stmt.axes, SERIAL_BLOCK) if any(fold.blocked for fold in folds) else None
        self._fold_axis(stmt, folds, 0, level, "0", self.printer.size(stmt.axes[0][1]) if stmt.axes else "1")
        at = f"[{self.lane}]"
        pairs = list(zip(stmt.accumulators, folds, strict=True))
        results = {name: text for acc, fold in pairs for name, text in zip(acc.names, fold.results(at), strict=True)}
        dtypes = {name: acc.dtype for acc in stmt.accumulators for name in acc.names}
        plain = {fold.name + at for fold in folds}
        arrays = {
            name: self._array(register_type(dtypes[name]), self.out.fresh("v"))
            for name, text in results.items()
            if text not in plain
        }

        def finish() -> None:
            for name, array in arrays.items():
                self.out.line(f"{array}{at} = {results[name]};")

        self.lane_loop(finish)
        for name, text in results.items():
            self.lane_locals[name] = arrays[name] + at if name in arrays else text

    def start(self, variables: Sequence[tuple[str, str, str]]) -> None:
        """Lane arrays, given as name, type and initial value."""
        for name, ctype, _ in variables:
            self._array(ctype, name)

        def fill() -> None:
            for name, _, start in variables:
                self.out.line(f"{name}[{self.lane}] = {start};")

        self.lane_loop(fill)

    def _fold_axis(self, stmt: Fold, folds: list[Folding], level: int, split: int | None, begin: str, end: str) -> None:
        if level == len(stmt.axes):
            self._element(stmt, folds)
            return
        if level == split:
            self._fold_block(stmt, folds, level, end)
            return
        var, extent = stmt.axes[level]
        following = self.printer.size(stmt.axes[level + 1][1]) if level + 1 < len(stmt.axes) else ""
        with self.out.scope(certain=at_least_one(extent)) as inner:
            text = self.printer.enter(var, extent)
            self._fold_axis(stmt, folds, level + 1, split, "0", following)
            self.printer.open_axes.pop()
        self.out.block(for_text(text, begin, end), inner)

    def _fold_block(self, stmt: Fold, folds: list[Folding], level: int, end: str) -> None:
        step = block_step(stmt.axes, level, SERIAL_BLOCK)
        start = self.out.fresh("k")
        sums = [fold for fold in folds if fold.blocked]
        moments = [fold for fold in folds if isinstance(fold, ShiftedMoments)]
        with self.out.scope(certain=at_least_one(stmt.axes[level][1])) as inner:
            self.start([(fold.name + v.suffix, v.type, v.start) for fold in sums for v in fold.inner])
            self.out.line(f"const int64_t {start}_end = dc::min_index({start} + {step}, {end});")
            for fold in moments:
                self._choose_shift(stmt, fold, level, start)
            self._fold_axis(stmt, folds, level, None, start, f"{start}_end")
            several = any(fold.several for fold in moments)
            count = self.printer.block_count(stmt.axes, level, start) if several else str(volume(stmt.axes, ()))
            if moments:
                self._sum_again(stmt, moments, level, start, count)

            def close() -> None:
                at = f"[{self.lane}]"
                for fold in sums:
                    counted = fold.close_counted(count, at) if isinstance(fold, ShiftedMoments) else None
                    self.out.scopes[-1].lines += counted or fold.close_block(at)

            self.lane_loop(close)
        self.out.block(f"for (int64_t {start} = 0; {start} < {end}; {start} += {step})", inner)

    def _choose_shift(self, stmt: Fold, fold: ShiftedMoments, level: int, start: str) -> None:
        """Each lane's running mean, or the mean of a few elements of its block where there is none yet."""
        printer, out, at = self.printer, self.out, f"[{self.lane}]"
        self._array(fold.type, fold.shift)
        self.lane_loop(lambda: out.line(f"{fold.shift}{at} = ({fold.type}){fold.name}_mean{at};"))
        with out.scope(certain=False) as inner:
            head = printer.enter_sample(stmt.axes[level:], start)

            def take() -> None:
                for let in stmt.lets:
                    printer.let(let)
                out.line(fold.sample(out.value(fold.acc.expr), at))

            self.lane_loop(take)
            del printer.open_axes[len(printer.open_axes) - len(stmt.axes[level:]) :]
        with out.scope(certain=False) as guarded:
            out.block(head, inner)
            self.lane_loop(lambda: out.line(fold.finite(at)))
        out.block(f"if ({fold.name}_n[0] == 0.0)", guarded)

    def _sum_again(self, stmt: Fold, moments: list[ShiftedMoments], level: int, start: str, count: str) -> None:
        """The block once more if a lane's shift lay far off."""
        out, at, flag = self.out, f"[{self.lane}]", self.out.fresh("t")
        out.line(f"int {flag} = 0;")
        tests = " | ".join(f"({fold.cancels(count, at)})" for fold in moments)
        self.lane_loop(lambda: out.line(f"{flag} |= {tests};"), clause=f" reduction(|:{flag})")
        with out.scope(certain=False) as inner:

            def restart() -> None:
                for fold in moments:
                    out.scopes[-1].lines.extend(fold.again(count, at))

            self.lane_loop(restart)
            only = replace(stmt, accumulators=tuple(fold.acc for fold in moments), writes=())
            self._fold_axis(only, list(moments), level, None, start, f"{start}_end")
        out.block(f"if ({flag})", inner)

    def _element(self, stmt: Fold, folds: list[Folding]) -> None:
        def each() -> None:
            for let in stmt.lets:
                self.printer.let(let)
            position = self.out.index(row_major(stmt.axes)) if any(fold.is_arg for fold in folds) else "0"
            for fold in folds:
                for text in fold.update([self.out.value(e) for e in fold.acc.exprs], position, f"[{self.lane}]"):
                    self.out.line(text)
            for write in stmt.writes:
                self.printer.write(write)

        axes = self.printer.open_axes
        self.lane_loop(each, not any(conflicts(write, self.axis[0], axes) for write in stmt.writes))


def _mentions(line: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", line) is not None
