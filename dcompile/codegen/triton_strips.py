"""Prints a kernel in strips: one loop over the rows of a strip, whole rows at a time, and running values of columns.

What a row reads that does not depend on the row is loaded once, before the loop. The loads of the loop are prefetched
(``Launch.stages``).
"""

from __future__ import annotations

from collections.abc import Callable

from dcompile.codegen.triton_kernel import KernelPrinter
from dcompile.codegen.triton_scan import rule_function
from dcompile.codegen.triton_text import literal, register_text
from dcompile.codegen.triton_values import INNER, OUTER, Scope
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.combine import left, right
from dcompile.ir.index import product
from dcompile.ir.kernel import Scratch, Write
from dcompile.ir.nodes import Axis

STRIP, ROW = 1, 2
"""How many scopes are open around what belongs to a strip, and to a row."""


class StripPrinter(KernelPrinter):
    """As ``KernelPrinter``, for shapes that have ``strips``. A program is one strip, or a block of its columns."""

    def print(self, program: str = "tl.program_id(0)") -> list[str]:
        """The lines of the body."""
        strips, inner = self.shape.strips, self.shape.inner
        if strips is None or inner is None:
            raise CompilerBug("a kernel without strips")
        self.line(f"program = {program}")
        if self.shape.tiled:
            self.line(f"tiles = tl.cdiv({self._size(product(tuple(size for _, size in inner)))}, R)")
            self.line("strip, first = program // tiles, (program % tiles) * R")
        else:
            self.line("strip, first = program, 0")
        self.line("r = first + tl.arange(0, R)[None, :]")
        self.scopes.append(Scope())
        for var, extent in self.shape.outer:
            self.extents[var] = extent
            self.scopes[-1].symbols[var] = "strip"
        self._enter("r", INNER, inner)
        self._start(strips.memory, strips.start)
        count = product(tuple(size for _, size in strips.rows))
        stages = f", num_stages={self.launch.stages}" if self.launch.stages > 1 else ""
        self.before_loop = len(self.lines)
        self.line(f"for row in tl.range(0, {self._size(count)}, X{stages}):")
        self.depth += 1
        with self.scope():
            self.active = frozenset({OUTER})
            self.line("x = row + tl.arange(0, X)[:, None]")
            self._enter("x", OUTER, strips.rows)
            self._statements(self.shape.body)
        self.depth -= 1
        self._end(strips.end)
        return self.lines

    def _start(self, memory: tuple[Scratch, ...], start: tuple[Write, ...]) -> None:
        self.running: dict[str, str] = {}
        self.before_loop = 0
        for number, (scratch, write) in enumerate(zip(memory, start, strict=True)):
            if not isinstance(write.expr, ex.Const) or write.buffer != scratch.name:
                raise CompilerBug("a running value of a column starts from no constant")
            name = self.running[scratch.name] = f"column{number}"
            self.dtypes[scratch.name] = scratch.dtype
            self.scratch[scratch.name] = None
            self.dims[name] = frozenset({OUTER, INNER})
            start_text = literal(write.expr.value, scratch.dtype)
            self.line(f"{name} = tl.full([X, R], 0, {register_text(scratch.dtype)}) + {start_text}")

    def _end(self, writes: tuple[Write, ...]) -> None:
        """The running values of the rows that were taken at once become one a column, which is written."""
        for name in self.running.values():
            if self.launch.block > 1:
                self.line(f"{name} = tl.reduce({name}, 0, {self.name}_{name}, keep_dims=True)")
            self.dims[name] = frozenset({INNER})
        self.active = frozenset({INNER})
        for write in writes:
            self._write(write)

    def _inner(self, axes: tuple[Axis, ...], body: Callable[[], None]) -> None:
        """All inner positions of a row: they are the same for every row."""
        with self.scope(self._shared):
            self._shared = self.scopes[-1]
            body()

    def _write(self, stmt: Write) -> None:
        if stmt.buffer not in self.running:
            super()._write(stmt)
            return
        name, dtype = self.running[stmt.buffer], register_text(self.dtypes[stmt.buffer])
        value = f"{self.value(stmt.expr)}.to({dtype})"
        here = " & ".join(self._existing(frozenset({OUTER})))  # columns that do not exist are never written
        self.line(f"{name} = tl.where({here}, {value}, {name})" if here else f"{name} = {value}")
        if self.launch.block > 1:
            self._rule(name, stmt)

    def _rule(self, name: str, stmt: Write) -> None:
        """The function that combines running values, as the row's element is combined with them."""

        def leaf(node: ex.Expr) -> ex.Expr | None:
            if isinstance(node, ex.Load) and node.buffer == stmt.buffer:
                return left(0, node.dtype)
            return right(0, node.dtype) if isinstance(node, ex.Local) else None

        self.helpers += rule_function(f"{self.name}_{name}", (ex.transform(stmt.expr, leaf),))

    def _from_scratch(self, node: ex.Load) -> str:
        return self.running.get(node.buffer) or super()._from_scratch(node)

    def _found(self, node: ex.Expr) -> str | None:
        if isinstance(node, ex.Load) and node.buffer in self.running:
            return self.running[node.buffer]
        return super()._found(node)

    def _define(self, node: ex.Expr) -> None:
        if not isinstance(node, ex.Load) or not self._same_for_all_rows(node):
            super()._define(node)
            return
        kept = self.lines, self.depth, self.scopes, self.active
        self.lines, self.depth, self.scopes, self.active = [], 1, self.scopes[: STRIP + 1], frozenset({INNER})
        super()._define(node)
        made, (self.lines, self.depth, self.scopes, self.active) = self.lines, kept
        self.lines[self.before_loop : self.before_loop] = made
        self.before_loop += len(made)

    def _same_for_all_rows(self, node: ex.Load) -> bool:
        strips = self.shape.strips
        if strips is None or len(self.scopes) <= ROW or self.masks or node.bind:
            return False
        if node.buffer in self.own or node.buffer in self.scratch:
            return False
        return not node.index[0].free_symbols & {var for var, _ in strips.rows}
