"""Prints one kernel as a Triton function: outer positions along dimension 0 of every block, inner ones along 1.

Values that do not depend on the inner position have extent 1 there, scalars have no dimensions; both broadcast. Every
load and store is masked by the positions that exist, and inside ``Masked`` by its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import sympy

from dcompile.codegen.triton_expr import INT_DIVISIONS, op_text
from dcompile.codegen.triton_launch import Launch, Shape
from dcompile.codegen.triton_text import (
    INT32_REACH,
    index_text,
    literal,
    neutral,
    reach,
    register_text,
    rounded,
    type_text,
)
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import as_expr, product
from dcompile.ir.kernel import Fold, Let, Nest, Scratch, Stmt, Write
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType, Size

OUTER, INNER = 0, 1
_INDENT = "    "


@dataclass
class Scope:
    """What is known while a block of statements is printed: texts by expression and mask, and their dimensions."""

    names: dict[tuple[ex.Expr, str], str] = field(default_factory=dict)
    locals: dict[str, str] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, str] = field(default_factory=dict)


class KernelPrinter:
    """Writes the body of one function.

    Args:
        shape, launch: the kernel's form and cut.
        dtypes: element type of each buffer.
        sizes: parameter of each size symbol.
        own: buffers the kernel writes.
    """

    def __init__(
        self,
        shape: Shape,
        launch: Launch,
        dtypes: Mapping[str, DType],
        sizes: Mapping[sympy.Symbol, str],
        own: frozenset[str],
    ) -> None:
        self.shape, self.launch, self.dtypes, self.own = shape, launch, dict(dtypes), own
        self.lines: list[str] = []
        self.depth = 1
        self.scopes = [Scope(symbols=dict(sizes))]
        self.extents: dict[sympy.Symbol, Size] = {}
        self.dims: dict[str, frozenset[int]] = {}
        self.active = frozenset({OUTER})
        self.masks: list[str] = []
        self.scratch: dict[str, tuple[sympy.Expr, str] | None] = {}
        self.kept: dict[tuple[str, sympy.Expr], str] = {}
        self.reports = False
        self.dirty = False
        self._count = 0
        self._shared: Scope | None = None

    def print(self) -> list[str]:
        """The lines of the body."""
        total = product(tuple(size for _, size in self.shape.outer))
        program = "tl.program_id(0)" if _is_narrow(total) else "tl.program_id(0).to(tl.int64)"
        self.line(f"x = {program} * X + tl.arange(0, X){'' if self.shape.inner is None else '[:, None]'}")
        self._enter("x", OUTER, self.shape.outer)
        self._statements(self.shape.body)
        return self.lines

    # positions

    def _enter(self, name: str, dim: int, axes: tuple[Axis, ...]) -> None:
        """The mask of the positions that exist among ``name``'s, and one variable for each axis, row-major."""
        self.line(f"{name}_here = {name} < {self._size(product(tuple(size for _, size in axes)))}")
        self.dims[name] = self.dims[f"{name}_here"] = frozenset({dim})
        self._axes(name, axes, dim)

    def _axes(self, name: str, axes: tuple[Axis, ...], dim: int) -> None:
        step: Size = 1
        for number, (var, extent) in reversed(list(enumerate(axes))):
            text = name if step == 1 else f"{name} // {self._size(step)}"
            if number > 0:
                text = f"({text}) % {self._size(extent)}"
            self.extents[var] = extent
            text = name if text == name else self.define(text, frozenset({dim}))
            self.scopes[-1].symbols[var] = text
            step = product((step, extent))

    def _size(self, size: Size) -> str:
        return index_text(as_expr(size), lambda symbol: self._symbol(symbol, {}))

    def _symbol(self, symbol: sympy.Symbol, bound: Mapping[sympy.Symbol, str]) -> str:
        if symbol in bound:
            return bound[symbol]
        for scope in reversed(self.scopes):
            if symbol in scope.symbols:
                return scope.symbols[symbol]
        raise CompilerBug(f"{symbol} is neither a loop variable nor a size of this kernel")

    def index(self, expr: sympy.Expr, bind: Sequence[ex.Expr] = ()) -> tuple[str, frozenset[int]]:
        """An integer expression and the dimensions it varies along; in 64 bits unless 32 certainly do."""
        bound = {ex.bound(n): self.value(b) for n, b in enumerate(bind)}
        used: set[int] = set()
        limit = reach(expr.xreplace(dict.fromkeys(bound, sympy.Integer(1))), self.extents)
        narrow = limit is not None and limit <= INT32_REACH

        def name(symbol: sympy.Symbol) -> str:
            text = self._symbol(symbol, bound)
            used.update(self.dims.get(text, ()))
            return text if narrow or symbol in bound or symbol not in self.extents else f"{text}.to(tl.int64)"

        return index_text(expr, name), frozenset(used)

    # lines

    def line(self, text: str) -> None:
        self.lines.append(_INDENT * self.depth + text)

    def define(self, text: str, dims: frozenset[int]) -> str:
        """A fresh name for ``text``."""
        name = f"t{self._count}"
        self._count += 1
        self.line(f"{name} = {text}")
        self.dims[name] = dims
        return name

    @contextmanager
    def scope(self, known: Scope | None = None) -> Iterator[None]:
        """The inner range; names defined inside are forgotten afterwards, or kept in ``known``."""
        self.scopes.append(known or Scope())
        self.active = frozenset({OUTER, INNER})
        try:
            yield
        finally:
            self.scopes.pop()
            self.active = frozenset({OUTER})

    # statements

    def _statement(self, stmt: Stmt) -> None:
        if isinstance(stmt, Let):
            self._let(stmt)
        elif isinstance(stmt, Write):
            self._write(stmt)
        elif isinstance(stmt, Scratch):
            self.dtypes[stmt.name] = stmt.dtype
            self.scratch[stmt.name] = None
        elif isinstance(stmt, Nest):
            self._inner(stmt.axes, partial(self._statements, stmt.body))
        else:
            self._fold(stmt)

    def _statements(self, body: tuple[Stmt, ...]) -> None:
        for stmt in body:
            self._statement(stmt)

    def _let(self, stmt: Let) -> None:
        self.scopes[-1].locals[stmt.name] = self.value(stmt.expr)

    def _inner(self, axes: tuple[Axis, ...], body: Callable[[], None]) -> None:
        """``body`` for every inner position: at once, or block by block."""
        total = product(tuple(size for _, size in axes))
        if self.launch.persistent:
            with self.scope(self._shared):
                if self._shared is None:
                    self.line("r = tl.arange(0, R)[None, :]")
                    self._enter("r", INNER, axes)
                    self._shared = self.scopes[-1]
                body()
            return
        self._settle()
        self.line(f"for r_start in range(0, {self._size(total)}, R):")
        self.depth += 1
        with self.scope():
            start = "r_start" if _is_narrow(total) else "tl.cast(r_start, tl.int64)"
            self.line(f"r = {start} + tl.arange(0, R)[None, :]")
            self._enter("r", INNER, axes)
            body()
        self.depth -= 1

    def _settle(self) -> None:
        """Before a read of what other threads of this program may have written."""
        if self.dirty:
            self.line("tl.debug_barrier()")
            self.dirty = False

    def _mask(self, dims: frozenset[int]) -> list[str]:
        """Conditions under which an access that varies along ``dims`` happens."""
        parts = [text for text, dim in (("x_here", OUTER), ("r_here", INNER)) if dim in dims]
        return parts + self.masks

    def _pointer(self, buffer: str, address: str, have: frozenset[int], want: frozenset[int]) -> str:
        """The address as a block that varies along ``want``."""
        zeros = [f"{name} * 0" for name, dim in (("x", OUTER), ("r", INNER)) if dim in want - have]
        return f"{buffer} + {' + '.join([f'({address})', *zeros])}" if zeros else f"{buffer} + {address}"

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

    def _not_empty(self, bind: Sequence[ex.Expr]) -> list[str]:
        """Conditions under which positions that ``wrap_index`` gives exist at all."""
        parts = (node for b in bind for node in ex.walk(b))
        sizes = {node.args[1] for node in parts if isinstance(node, ex.Op) and node.name == "wrap_index"}
        doubtful = [size for size in sizes if not (isinstance(size, ex.Const) and size.value > 0)]
        return sorted(f"({self.value(size)} > 0)" for size in doubtful)

    # folds

    def _fold(self, stmt: Fold) -> None:
        accumulators = [(f"acc{self._count + n}", acc) for n, acc in enumerate(stmt.accumulators)]
        self._count += len(accumulators)
        total = product(tuple(size for _, size in stmt.axes))
        positions = "tl.int32" if _is_narrow(total) else "tl.int64"
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
        wide = f"{value}.to({register})" if dtype is DType.BOOL else value
        here = f"tl.where(x_here & r_here, {wide}, {neutral(kind, dtype)}).to({register})"
        is_arg = kind.startswith("arg")
        at = f"tl.where(x_here & r_here, r, {last}).to({positions})"
        if self.launch.persistent:
            self.line(f"{name} = {here}")
            if is_arg:
                self.line(f"{name}_at = {at}")
        elif is_arg:
            self.line(f"{name}, {name}_at = fold_{kind}({name}, {name}_at, {here}, {at})")
        else:
            self.line(f"{name} = {_combine(kind)}({name}, {here})")

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

    # expressions

    def value(self, root: ex.Expr) -> str:
        """The name or literal of ``root``; defines what is missing."""
        stack: list[tuple[ex.Expr, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if self._found(node) is not None:
                continue
            if ready:
                self._define(node)
                continue
            stack.append((node, True))
            children = (node.cond, node.other) if isinstance(node, ex.Masked) else node.children
            stack.extend((child, False) for child in reversed(children))
        text = self._found(root)
        if text is None:
            raise CompilerBug(f"no Triton text for {type(root).__name__}")
        return text

    def _key(self, node: ex.Expr) -> tuple[ex.Expr, str]:
        return node, " & ".join(self.masks)

    def _found(self, node: ex.Expr) -> str | None:
        if isinstance(node, ex.Local):
            for scope in reversed(self.scopes):
                if node.name in scope.locals:
                    return scope.locals[node.name]
            raise CompilerBug(f"the local {node.name} is read before it is defined")
        key = self._key(node)
        for scope in reversed(self.scopes):
            if key in scope.names:
                return scope.names[key]
        return None

    def _define(self, node: ex.Expr) -> None:
        if isinstance(node, ex.Load):
            name = self._load(node)
        elif isinstance(node, ex.Const):
            name = self.define(literal(node.value, node.dtype), frozenset())
        elif isinstance(node, ex.Index):
            text, dims = self.index(node.expr, node.bind)
            name = self.define(f"tl.cast({text}, tl.int64)", dims)
            if node.dtype is not DType.I64:
                name = self.define(op_text("to", (name,), DType.I64, node.dtype), dims)
        elif isinstance(node, ex.Masked):
            name = self._masked(node)
        elif isinstance(node, ex.Op):
            name = self._op(node)
        else:
            raise CompilerBug(f"no Triton text for {type(node).__name__}")
        self.scopes[-1].names[self._key(node)] = name

    def _masked(self, node: ex.Masked) -> str:
        condition, other = self.value(node.cond), self.value(node.other)
        self.masks.append(condition)
        body = self.value(node.body)
        self.masks.pop()
        dims = self.dims[condition] | self.dims.get(body, frozenset()) | self.dims.get(other, frozenset())
        return self.define(f"tl.where({condition}, {body}, {other})", dims)

    def _op(self, node: ex.Op) -> str:
        args = tuple(self.value(arg) for arg in node.args)
        dims = frozenset().union(*(self.dims.get(arg, frozenset()) for arg in args))
        operand = node.args[-1].dtype
        if node.name == "wrap_index":
            position, size = args
            wrapped = self.define(f"tl.where({position} < 0, {position} + {size}, {position})", dims)
            bad = self.define(f"({wrapped} < 0) | ({wrapped} >= {size})", dims)
            self._report(bad, dims, 1)
            return self.define(f"tl.where({bad}, 0, {wrapped})", dims)
        if node.name in INT_DIVISIONS and operand.is_int:
            divisor = node.args[1]
            if not (isinstance(divisor, ex.Const) and divisor.value != 0):
                self._report(self.define(f"{args[1]} == 0", self.dims[args[1]]), dims, 2)
        return self.define(op_text(node.name, args, operand, node.dtype), dims)

    def _report(self, bad: str, dims: frozenset[int], code: int) -> None:
        """Leave ``code`` in the kernel's fault word where ``bad`` holds at positions that exist."""
        self.reports = True
        wanted = dims.union(*(self.dims[mask] for mask in self.masks))
        pointer = self._pointer("fault", "0", frozenset(), wanted)
        self.line(f"tl.store({pointer}, {code}, mask={' & '.join([bad, *self._mask(wanted)])})")

    def _load(self, node: ex.Load) -> str:
        if len(node.index) != 1:
            raise CompilerBug(f"a kernel loads {node.buffer} by {len(node.index)} positions instead of one address")
        if node.buffer not in self.dtypes:
            raise CompilerBug(f"a kernel touches {node.buffer}, which is not among its buffers")
        if node.buffer in self.scratch:
            return self._from_scratch(node)
        if self.launch.persistent and node.buffer in self.own and not node.bind:
            kept = self.kept.get((node.buffer, node.index[0]))
            if kept is not None:
                return kept
        if node.buffer in self.own:
            self._settle()
        address, dims = self.index(node.index[0], node.bind)
        guards = self._not_empty(node.bind)
        wanted = dims.union(*(self.dims[mask] for mask in self.masks))
        mask = [*self._mask(wanted), *guards]
        pointer = self._pointer(node.buffer, address, dims, wanted)
        text = f"tl.load({pointer}, mask={' & '.join(mask)}, other=0)" if mask else f"tl.load({pointer})"
        if node.dtype.is_low_precision:
            text += ".to(tl.float32)"
        return self.define(text, wanted)

    def _from_scratch(self, node: ex.Load) -> str:
        written = self.scratch[node.buffer]
        if written is None or node.index[0] != written[0]:
            raise CompilerBug(f"scratch memory {node.buffer} is read at another position than it was written")
        return written[1]


def _is_narrow(total: Size) -> bool:
    """Whether positions of a range of ``total`` fit 32 bits."""
    return isinstance(total, int) and total <= INT32_REACH


def _accumulated(dtype: DType) -> DType:
    return DType.I32 if dtype is DType.BOOL else dtype


def _combine(kind: str) -> str:
    return {"max": "nan_max", "min": "nan_min"}.get(kind, f"fold_{kind}")
