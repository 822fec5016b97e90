"""Prints one kernel as a Triton function: outer positions along dimension 0 of every block, inner ones along 1.

Values that do not depend on the inner position have extent 1 there, scalars have no dimensions; both broadcast. Every
load and store is masked by the positions that exist, and inside ``Masked`` by its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dcompile.codegen.triton_launch import loops_nest
from dcompile.codegen.triton_scan import asked_at_once, look_back_functions, rule_function
from dcompile.codegen.triton_text import literal, neutral, register_text, rounded, type_text
from dcompile.codegen.triton_values import INNER, OUTER, Scope, Values, is_narrow
from dcompile.errors import CompilerBug
from dcompile.ir.index import product
from dcompile.ir.kernel import Fold, Let, Nest, ScanLoop, Scratch, Stmt, Write
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType, Size


class KernelPrinter(Values):
    """Writes the body of one function: its statements. See ``Values`` for the arguments."""

    def print(self, program: str = "tl.program_id(0)") -> list[str]:
        """The lines of the body; ``program`` is the number of the program among those that run it."""
        total = product(tuple(size for _, size in self.shape.outer))
        program = program if is_narrow(total) else f"{program}.to(tl.int64)"
        if self.shape.tiles is not None:
            program = self._take_up_tile(self.shape.tiles.state, total)
        if self.shape.tiled and self.shape.inner is not None:
            self.line(f"tile = {program}")
            self.line(f"tiles = tl.cdiv({self._size(product(tuple(size for _, size in self.shape.inner)))}, R)")
            program = "(tile // tiles)"
        self.line(f"x = {program} * X + tl.arange(0, X){'' if self.shape.inner is None else '[:, None]'}")
        self._enter("x", OUTER, self.shape.outer)
        self._statements(self.shape.body)
        return self.lines

    def _take_up_tile(self, state: str, total: Size) -> str:
        """Programs take tiles in the order in which they start, so that whoever a tile waits for has started."""
        assert self.shape.inner is not None
        narrow = is_narrow(product((total, *(size for _, size in self.shape.inner))))
        self.line(f'turn = tl.atomic_add({state}, 1, sem="relaxed"){".to(tl.int32)" if narrow else ""}')
        self.line(f"blocks = tl.cdiv({self._size(total)}, X)")
        self.line("tile = turn // blocks")
        return "(turn % blocks)"

    # positions

    def _enter(self, name: str, dim: int, axes: tuple[Axis, ...]) -> None:
        """The mask of the positions that exist among ``name``'s, and one variable for each axis, row-major."""
        total, block = (
            product(tuple(size for _, size in axes)),
            self.launch.block if dim == OUTER else self.launch.inner,
        )
        self.dims[name] = self.dims[f"{name}_here"] = frozenset({dim})
        if isinstance(total, int) and total % block == 0:
            self.whole.add(name)
        else:
            self.line(f"{name}_here = {name} < {self._size(total)}")
        self._axes(name, axes, dim)

    def _axes(self, name: str, axes: tuple[Axis, ...], dim: int | None) -> None:
        """Variables of the axes whose positions ``name`` counts along a dimension, or None for one number."""
        dims = frozenset() if dim is None else frozenset({dim})
        step: Size = 1
        for number, (var, extent) in reversed(list(enumerate(axes))):
            text = name if step == 1 else f"{name} // {self._size(step)}"
            if number > 0:
                text = f"({text}) % {self._size(extent)}"
            self.extents[var] = extent
            text = name if text == name else self.define(text, dims)
            self.scopes[-1].symbols[var] = text
            step = product((step, extent))

    # statements

    def _statement(self, stmt: Stmt) -> None:
        if isinstance(stmt, Let):
            self._let(stmt)
        elif isinstance(stmt, Write):
            self._write(stmt)
        elif isinstance(stmt, Scratch):
            self.dtypes[stmt.name] = stmt.dtype
            self.scratch[stmt.name] = None
        elif isinstance(stmt, ScanLoop):
            self._scan(stmt)
        elif isinstance(stmt, Nest):
            self._inner(stmt.axes, partial(self._statements, stmt.body))
        elif isinstance(stmt, Fold):
            self._fold(stmt)
        else:
            raise CompilerBug("a GPU kernel scans")

    def _statements(self, body: tuple[Stmt, ...]) -> None:
        for stmt in body:
            self._statement(stmt)

    def _let(self, stmt: Let) -> None:
        self.scopes[-1].locals[stmt.name] = self.value(stmt.expr)

    def _inner(self, axes: tuple[Axis, ...], body: Callable[[], None]) -> None:
        """``body`` for every inner position: at once, or block by block."""
        total = product(tuple(size for _, size in axes))
        if self.shape.tiled:
            with self.scope():
                self.line("r = (tile % tiles) * R + tl.arange(0, R)[None, :]")
                self._enter("r", INNER, axes)
                body()
            return
        if self.launch.persistent:
            with self.scope(self._shared):
                if self._shared is None:
                    start = "tile * R + " if self.shape.tiles is not None else ""
                    self.line(f"r = {start}tl.arange(0, R)[None, :]")
                    self._enter("r", INNER, axes)
                    self._shared = self.scopes[-1]
                body()
            return
        self._settle()
        if loops_nest(self.shape):
            self._nested(axes, body)
            return
        self.line(f"for r_start in range(0, {self._size(total)}, R):")
        self.depth += 1
        with self.scope():
            start = "r_start" if is_narrow(total) else "tl.cast(r_start, tl.int64)"
            self.line(f"r = {start} + tl.arange(0, R)[None, :]")
            self._enter("r", INNER, axes)
            body()
        self.depth -= 1

    def _nested(self, axes: tuple[Axis, ...], body: Callable[[], None]) -> None:
        """The last axis block by block, for every position of the others: only numbers are divided, no elements."""
        *lead, (var, extent) = axes
        kind = "tl.int32" if is_narrow(product(tuple(size for _, size in axes))) else "tl.int64"
        self.line(f"for lead_start in range(0, {self._size(product(tuple(size for _, size in lead)))}):")
        self.depth += 1
        self.scopes.append(Scope())
        self.line(f"lead = tl.cast(lead_start, {kind})")
        step: Size = 1
        for number, (symbol, size) in reversed(list(enumerate(lead))):
            text = "lead" if step == 1 else f"lead // {self._size(step)}"
            self.extents[symbol] = size
            text = (
                text if number == 0 and text == "lead" else self.define(f"({text}) % {self._size(size)}", frozenset())
            )
            self.scopes[-1].symbols[symbol] = text
            step = product((step, size))
        self.line(f"for r_start in range(0, {self._size(extent)}, R):")
        self.depth += 1
        with self.scope():
            self.line(f"r_in = tl.cast(r_start, {kind}) + tl.arange(0, R)[None, :]")
            self.line(f"r = lead * {self._size(extent)} + r_in")
            for name in ("r", "r_in", "r_here"):
                self.dims[name] = frozenset({INNER})
            if isinstance(extent, int) and extent % self.launch.inner == 0:
                self.whole.add("r")
            else:
                self.line(f"r_here = r_in < {self._size(extent)}")
            self.extents[var] = extent
            self.scopes[-1].symbols[var] = "r_in"
            body()
        self.depth -= 2
        self.scopes.pop()

    def _write(self, stmt: Write) -> None:
        value = self.value(stmt.expr)
        dtype = self.dtypes[stmt.buffer]
        if stmt.buffer in self.scratch:
            self.scratch[stmt.buffer] = (stmt.address, value)
            return
        address, dims = self.index(stmt.address, stmt.bind)
        mask = [*self._mask(self.active), *self._not_empty(stmt.bind)]
        pointer = self._pointer(stmt.buffer, address, dims, self.active)
        stored = f"({value}).to({type_text(dtype)})" if dtype.is_low_precision else value
        guard = f", mask={' & '.join(mask)}" if mask else ""
        if stmt.mode == "add":
            if dtype.itemsize == 1 or dtype is DType.I16:
                raise CompilerBug(f"no GPU adds {dtype.value} elements atomically")
            self.line(f'tl.atomic_add({pointer}, {stored}{guard}, sem="relaxed")')
        else:
            self.line(f"tl.store({pointer}, {stored}{guard})")
            if not stmt.bind:
                self.kept[stmt.buffer, stmt.address] = value
        self.dirty = True

    # scans

    def _scan(self, stmt: ScanLoop) -> None:
        rule = f"{self.name}_rule{len(self.helpers)}"
        self.helpers += rule_function(rule, stmt.combine)
        types = [register_text(_accumulated(e.dtype)) for e in stmt.exprs]
        running = [f"scan{self._count + n}" for n in range(len(stmt.names))]
        carried = [f"{name}_carried" for name in running]
        self._count += len(running)
        if not self.launch.persistent:
            for n, (name, kind) in enumerate(zip(carried, types, strict=True)):
                start = literal(stmt.start[n].value, stmt.start[n].dtype) if stmt.start else "0"
                self.line(f"{name} = tl.full([X, 1], {start}, {kind})")

        def block() -> None:
            for let in stmt.lets:
                self._let(let)
            existing = " & ".join(self._existing(frozenset({OUTER, INNER})))
            for n, (expr, name, kind) in enumerate(zip(stmt.exprs, running, types, strict=True)):
                self.line(f"{name} = {self._block(self.value(expr), kind, expr.dtype)}")
                if existing and stmt.start:
                    start = literal(stmt.start[n].value, stmt.start[n].dtype)
                    self.line(f"{name} = tl.where({existing}, {name}, {start}).to({kind})")
            names = ", ".join(running)
            values = running[0] if len(running) == 1 else f"({names})"
            self.line(f"{names} = tl.associative_scan({values}, 1, {rule})")
            if stmt.tiles is not None:
                self._join_tiles(stmt, rule, running, types)
            elif not self.launch.persistent:
                self._carry(rule, running, carried, types, bool(stmt.start))
            for name, result, expr in zip(stmt.names, running, stmt.exprs, strict=True):
                self.dims[result] = frozenset({OUTER, INNER})
                self.scopes[-1].locals[name] = (
                    self.define(f"{result} != 0", self.dims[result]) if expr.dtype is DType.BOOL else result
                )
            for write in stmt.writes:
                self._write(write)

        self._inner(stmt.axes, block)

    def _join_tiles(self, stmt: ScanLoop, rule: str, running: Sequence[str], types: Sequence[str]) -> None:
        """What the tiles before this one come to enters its running values; those behind it are told."""
        assert stmt.tiles is not None
        if self.launch.inner != stmt.tiles.length:
            raise CompilerBug(f"tiles of {stmt.tiles.length} positions in blocks of {self.launch.inner}")
        tell, before = f"{rule}_tell", f"{rule}_before"
        self.helpers += look_back_functions(rule, [_accumulated(e.dtype).compute for e in stmt.exprs])
        extents = product(tuple(size for _, size in self.shape.outer)), stmt.axis[1]
        for name, extent in zip(("rows", "length"), extents, strict=True):
            text = self._size(extent)
            cast = f"tl.full([], {text}, tl.int64)" if isinstance(extent, int) else f"tl.cast({text}, tl.int64)"
            self.line(f"{name} = {cast}")
        place = f"{stmt.tiles.state}, x, tile, tl.cdiv(length, R), rows"
        sums, befores = [f"{name}_sum" for name in running], [f"{name}_before" for name in running]
        for name, total in zip(running, sums, strict=True):
            self.line(f"{total} = last_of_rows({name}, R)")
        self.line(f"{tell}({place}, tile == 0, {', '.join(sums)})")
        self.line(f"{', '.join(befores)} = {before}({place}, {asked_at_once(self.launch)})")
        for of, names in (("told", sums), ("all", running)):
            combined = [f"{name}_{of}" for name in running]
            self.line(f"{', '.join(combined)} = {rule}({', '.join([*befores, *names])})")
            for name, whole, kind in zip(names, combined, types, strict=True):
                self.line(f"{name} = tl.where(tile == 0, {name}, {whole}).to({kind})")
            if of == "told":
                self.line(f"{tell}({place}, True, {', '.join(sums)})")

    def _carry(
        self, rule: str, running: Sequence[str], carried: Sequence[str], types: Sequence[str], neutral_start: bool
    ) -> None:
        """What came before this block enters its running values, the last of which the next block gets."""
        combined = [f"{name}_all" for name in running]
        self.line(f"{', '.join(combined)} = {rule}({', '.join([*carried, *running])})")
        for name, whole, before, kind in zip(running, combined, carried, types, strict=True):
            new = whole if neutral_start else f"tl.where(r_start == 0, {name}, {whole})"
            self.line(f"{name} = ({new}).to({kind})")
            last = f"tl.where(r - r_start == R - 1, {name}, 0).to({kind})"
            self.line(f"{before} = tl.reduce({last}, 1, fold_sum, keep_dims=True)")

    # folds

    def _fold(self, stmt: Fold) -> None:
        accumulators = [(f"acc{self._count + n}", acc) for n, acc in enumerate(stmt.accumulators)]
        self._count += len(accumulators)
        total = product(tuple(size for _, size in stmt.axes))
        positions = "tl.int32" if is_narrow(total) else "tl.int64"
        last = "2147483647" if positions == "tl.int32" else "9223372036854775807"
        if not self.launch.persistent:
            for name, acc in accumulators:
                kind = register_text(_accumulated(acc.expr.dtype))
                self.line(f"{name} = tl.full([X, R], {neutral(acc.kind, acc.expr.dtype)}, {kind})")
                if acc.kind.startswith("arg"):
                    self.line(f"{name}_at = tl.full([X, R], {last}, {positions})")

        def element() -> None:
            for let in stmt.lets:
                self._let(let)
            values = [self.value(acc.expr) for _, acc in accumulators]
            for write in stmt.writes:
                self._write(write)
            for (name, acc), value in zip(accumulators, values, strict=True):
                self._accumulate(name, acc.kind, value, acc.expr.dtype, positions, last)

        self._inner(stmt.axes, element)
        for name, acc in accumulators:
            self._finish(name, acc.kind, acc.expr.dtype, last)
            self.dims[name] = frozenset({OUTER})
            self.scopes[-1].locals[acc.name] = name

    def _accumulate(self, name: str, kind: str, value: str, dtype: DType, positions: str, last: str) -> None:
        """One block enters the accumulator; lanes that do not exist count as neutral."""
        register = register_text(_accumulated(dtype))
        here, at = self._block(value, register, dtype), f"tl.broadcast_to(r, [X, R]).to({positions})"
        if existing := " & ".join(self._existing(frozenset({OUTER, INNER}))):
            here = f"tl.where({existing}, {here}, {neutral(kind, dtype)}).to({register})"
            at = f"tl.where({existing}, {at}, {last}).to({positions})"
        is_arg = kind.startswith("arg")
        if self.launch.persistent:
            self.line(f"{name} = {here}")
            if is_arg:
                self.line(f"{name}_at = {at}")
        elif is_arg:
            self.line(f"{name}, {name}_at = fold_{kind}({name}, {name}_at, {here}, {at})")
        else:
            self.line(f"{name} = {_combine(kind)}({name}, {here})")

    def _block(self, value: str, register: str, dtype: DType) -> str:
        """``value`` for every position of the block, in the type it accumulates in."""
        wide = f"{value}.to({register})" if dtype is DType.BOOL else value
        if self.dims.get(value):
            return f"tl.broadcast_to({wide}, [X, R]).to({register})"
        return f"(tl.full([X, R], 0, {register}) + {value}).to({register})"

    def _finish(self, name: str, kind: str, dtype: DType, last: str) -> None:
        """The block of partial results becomes one value for each outer position."""
        if kind.startswith("arg"):
            self.line(f"{name}, {name}_at = tl.reduce(({name}, {name}_at), 1, fold_{kind}, keep_dims=True)")
            self.line(f"{name} = tl.where({name}_at == {last}, 0, {name}_at).to(tl.int64)")
            return
        self.line(f"{name} = tl.reduce({name}, 1, {_combine(kind)}, keep_dims=True)")
        if dtype is DType.BOOL:
            self.line(f"{name} = {name} != 0")
        elif dtype.is_low_precision:
            self.line(f"{name} = {rounded(name, dtype)}")


def _accumulated(dtype: DType) -> DType:
    return DType.I32 if dtype is DType.BOOL else dtype


def _combine(kind: str) -> str:
    return {"max": "nan_max", "min": "nan_min"}.get(kind, f"fold_{kind}")
