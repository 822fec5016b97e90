"""Where each scalar of a Triton function goes: one name per distinct expression and mask, defined when first needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import sympy

from dcompile.codegen.triton_expr import INT_DIVISIONS, op_text
from dcompile.codegen.triton_launch import Launch, Shape
from dcompile.codegen.triton_text import INT32_REACH, index_text, literal, reach, rounded
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import as_expr
from dcompile.ir.types import DType, Size

OUTER, INNER = 0, 1
"""Dimensions of a block."""

_INDENT = "    "


@dataclass
class Scope:
    """What is known while a block of statements is printed: texts by expression and mask, locals, positions, and what
    dividing by a number takes."""

    names: dict[tuple[ex.Expr, str], str] = field(default_factory=dict)
    locals: dict[str, str] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, str] = field(default_factory=dict)
    divisors: dict[str, str] = field(default_factory=dict)


class Values:
    """The names of one function, and its lines.

    Args:
        shape, launch: the kernel's form and cut.
        dtypes: element type of each buffer.
        sizes: parameter of each size symbol.
        own: buffers the kernel writes.
        name: of the function, from which those of its helpers derive.

    Attributes:
        lines, helpers: the function's body, and functions of its own that it calls.
    """

    def __init__(
        self,
        shape: Shape,
        launch: Launch,
        dtypes: Mapping[str, DType],
        sizes: Mapping[sympy.Symbol, str],
        own: frozenset[str],
        name: str = "kernel",
    ) -> None:
        self.name = name
        self.shape, self.launch, self.dtypes, self.own = shape, launch, dict(dtypes), own
        self.lines: list[str] = []
        self.helpers: list[str] = []
        self.depth = 1
        self.scopes = [Scope(symbols=dict(sizes))]
        self.extents: dict[sympy.Symbol, Size] = {}
        self.dims: dict[str, frozenset[int]] = {}
        self.active = frozenset({OUTER})
        self.masks: list[str] = []
        self.scratch: dict[str, tuple[sympy.Expr, str] | None] = {}
        self.kept: dict[tuple[str, sympy.Expr], str] = {}
        self.whole: set[str] = set()
        self.reports = False
        self.dirty = False
        self._count = 0
        self._shared: Scope | None = None

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

    def _settle(self) -> None:
        """Before a read of what other threads of this program may have written."""
        if self.dirty:
            self.line("tl.debug_barrier()")
            self.dirty = False

    def _mask(self, dims: frozenset[int]) -> list[str]:
        """Conditions under which an access that varies along ``dims`` happens."""
        return self._existing(dims) + self.masks

    def _existing(self, dims: frozenset[int]) -> list[str]:
        """Conditions under which positions along ``dims`` exist; none along those that blocks fill exactly."""
        return [f"{name}_here" for name, dim in (("x", OUTER), ("r", INNER)) if dim in dims and name not in self.whole]

    def _pointer(self, buffer: str, address: str, have: frozenset[int], want: frozenset[int]) -> str:
        """The address as a block that varies along ``want``."""
        zeros = [f"{name} * 0" for name, dim in (("x", OUTER), ("r", INNER)) if dim in want - have]
        return f"{buffer} + {' + '.join([f'({address})', *zeros])}" if zeros else f"{buffer} + {address}"

    def _not_empty(self, bind: Sequence[ex.Expr]) -> list[str]:
        """Conditions under which positions that ``wrap_index`` gives exist at all."""
        parts = (node for b in bind for node in ex.walk(b))
        sizes = {node.args[1] for node in parts if isinstance(node, ex.Op) and node.name == "wrap_index"}
        doubtful = [size for size in sizes if not (isinstance(size, ex.Const) and size.value > 0)]
        return sorted(f"({self.value(size)} > 0)" for size in doubtful)

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
        key = self._key(node)
        self.scopes[-1].names[key] = name
        if self.scopes[-1] is self._shared and INNER not in self.dims.get(name, frozenset()):
            self.scopes[-2].names.setdefault(key, name)  # rows in registers have no loop: it is known after them too

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
        if node.name == "div" and operand.compute is DType.F32 and INNER in dims - self.dims.get(args[1], dims):
            return self._divided_by_row(args, node.dtype, dims)
        return self.define(op_text(node.name, args, operand, node.dtype), dims)

    def _divided_by_row(self, args: tuple[str, ...], dtype: DType, dims: frozenset[int]) -> str:
        """A division of many inner positions by one number: its reciprocal is taken once."""
        a, b = args
        parts = next((scope.divisors[b] for scope in reversed(self.scopes) if b in scope.divisors), None)
        if parts is None:
            parts = ", ".join(f"{name}{self._count}" for name in ("scale", "scaled", "inverse"))
            self._count += 1
            self.line(f"{parts} = row_divisor({b})")
            self.scopes[-1].divisors[b] = parts
        text = f"divide_by_row({a}, {parts})"
        return self.define(rounded(text, dtype) if dtype.is_low_precision else text, dims)

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


def is_narrow(total: Size) -> bool:
    """Whether positions of a range of ``total`` fit 32 bits."""
    return isinstance(total, int) and total <= INT32_REACH
