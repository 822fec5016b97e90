"""Where each scalar goes: one C++ constant per distinct expression, in the outermost loop that knows its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import sympy

from dcompile.codegen.cpp_expr import load_text, op_text, reports
from dcompile.codegen.cpp_types import LARGEST_INT32, bounds, index_text, literal, register_type
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import FloorDiv, Mod
from dcompile.ir.types import DType, Size


@dataclass
class Scope:
    """One pair of braces.

    Attributes:
        certain: the braces are entered whenever the braces around them are, so that what may fault can move out.
        names: constants defined here, by expression.
    """

    certain: bool
    lines: list[str] = field(default_factory=list)
    names: dict[ex.Expr, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What an expression depends on.

    Attributes:
        symbols: loop variables and sizes.
        locals: names of ``Let`` and ``Fold``.
        own: reads a buffer that the kernel itself writes, so its value changes.
        faults: touches memory or divides, so it must not be evaluated where the program does not.
        reports: may set the error bits.
    """

    symbols: frozenset[sympy.Symbol] = frozenset()
    locals: frozenset[str] = frozenset()
    own: bool = False
    faults: bool = False
    reports: bool = False

    def __or__(self, other: Facts) -> Facts:
        return Facts(
            self.symbols | other.symbols,
            self.locals | other.locals,
            self.own or other.own,
            self.faults or other.faults,
            self.reports or other.reports,
        )


@dataclass(frozen=True)
class Place:
    """C++ text of a name and the depth of the scope from which on it has that meaning."""

    text: str
    depth: int


class Emitter:
    """Writes the lines of one function.

    Args:
        buffers: C++ text and element type of each buffer; scratch memory is added by ``bind_scratch``.
        written: buffers whose contents change inside the kernel.
        extents: extent of every loop variable.
    """

    def __init__(
        self,
        buffers: Mapping[str, tuple[str, DType]],
        written: frozenset[str],
        extents: Mapping[sympy.Symbol, Size],
    ) -> None:
        self.buffers = dict(buffers)
        self.written = written
        self.extents = extents
        self.scopes: list[Scope] = [Scope(certain=True)]
        self.symbols: dict[sympy.Symbol, Place] = {}
        self.locals: dict[str, Place] = {}
        self.lane: str | None = None
        self.laned: set[str] = set()
        self._facts: dict[ex.Expr, Facts] = {}
        self._changing: list[tuple[Scope, ex.Expr]] = []
        self._count: dict[str, int] = {}

    # names

    def fresh(self, stem: str) -> str:
        """A C++ identifier not used before in this function."""
        number = self._count.get(stem, 0)
        self._count[stem] = number + 1
        return f"{stem}{number}"

    @property
    def depth(self) -> int:
        return len(self.scopes) - 1

    def bind_symbol(self, var: sympy.Symbol, text: str) -> None:
        self.symbols[var] = Place(text, self.depth)

    def bind_local(self, name: str, text: str) -> None:
        self.locals[name] = Place(text, self.depth)

    def bind_scratch(self, name: str, text: str, dtype: DType, per_lane: bool) -> None:
        self.buffers[name] = (text, dtype)
        if per_lane:
            self.laned.add(name)

    # lines

    def line(self, text: str) -> None:
        self.scopes[-1].lines.append(text)

    @contextmanager
    def scope(self, certain: bool) -> Iterator[Scope]:
        """Everything emitted inside goes into the yielded scope, whose lines the caller places by ``block``."""
        symbols, names = dict(self.symbols), dict(self.locals)
        inner = Scope(certain)
        self.scopes.append(inner)
        try:
            yield inner
        finally:
            self.scopes.pop()
            self.symbols, self.locals = symbols, names

    def block(self, head: str, inner: Scope, tail: str = "}") -> None:
        """Print ``head {``, the indented lines of ``inner``, and ``tail``."""
        self.line(head + " {")
        self.scopes[-1].lines.extend("#" + t[1:] if t.startswith("#") else "  " + t for t in inner.lines)
        self.line(tail)

    # expressions

    def facts(self, node: ex.Expr) -> Facts:
        """What ``node`` depends on."""
        for part in ex.walk(node):
            if part not in self._facts:
                self._facts[part] = self._own_facts(part)
        return self._facts[node]

    def _own_facts(self, node: ex.Expr) -> Facts:
        found = Facts()
        for child in node.children:
            found = found | self._facts[child]
        if isinstance(node, ex.Load):
            symbols = frozenset().union(*(i.free_symbols for i in node.index)) if node.index else frozenset()
            found = found | Facts(self._loop_symbols(symbols), own=node.buffer in self.written, faults=True)
        elif isinstance(node, ex.Index):
            found = found | Facts(self._loop_symbols(node.expr.free_symbols), faults=_may_divide_by_zero(node.expr))
        elif isinstance(node, ex.Local):
            found = found | Facts(locals=frozenset({node.name}))
        elif isinstance(node, ex.Op) and reports(node.name, node.args[-1].dtype):
            found = found | Facts(faults=True, reports=True)
        return found

    def _loop_symbols(self, symbols: set[sympy.Symbol] | frozenset[sympy.Symbol]) -> frozenset[sympy.Symbol]:
        return frozenset(s for s in symbols if s in self.extents)

    def value(self, root: ex.Expr) -> str:
        """C++ text of ``root``: an identifier or a literal. Emits what is missing."""
        stack: list[tuple[ex.Expr, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if self._found(node) is not None:
                continue
            if ready:
                self._emit(node)
                continue
            stack.append((node, True))
            children = (node.cond,) if isinstance(node, ex.Masked) else node.children
            stack.extend((child, False) for child in reversed(children))
        text = self._found(root)
        if text is None:
            raise CompilerBug(f"no C++ text for {type(root).__name__}")
        return text

    def _found(self, node: ex.Expr) -> str | None:
        if isinstance(node, ex.Const):
            return literal(node.value, node.dtype)
        if isinstance(node, ex.Local):
            place = self.locals.get(node.name)
            if place is None:
                raise CompilerBug(f"the local {node.name} is read before it is defined")
            return place.text
        for scope in reversed(self.scopes):
            if node in scope.names:
                return scope.names[node]
        return None

    def _home(self, facts: Facts) -> int:
        """Depth of the outermost scope that knows the inputs and runs only when the program evaluates the value."""
        if facts.own:
            return self.depth
        depth = 0
        for var in facts.symbols:
            if var not in self.symbols:
                raise CompilerBug(f"the loop variable {var} is used outside its loop")
            depth = max(depth, self.symbols[var].depth)
        for name in facts.locals:
            if name not in self.locals:
                raise CompilerBug(f"the local {name} is read before it is defined")
            depth = max(depth, self.locals[name].depth)
        if facts.faults:
            for level in range(self.depth, depth, -1):
                if not self.scopes[level].certain:
                    return level
        return depth

    def _emit(self, node: ex.Expr) -> None:
        facts = self.facts(node)
        home = self._home(facts)
        inner = self.scopes[home + 1 :]
        del self.scopes[home + 1 :]
        try:
            name = self.fresh("t")
            if isinstance(node, ex.Masked):
                self._emit_masked(node, name)
            else:
                self.line(f"const {register_type(node.dtype)} {name} = {self._text(node)};")
        finally:
            self.scopes.extend(inner)
        self.scopes[home].names[node] = name
        if facts.own:
            self._changing.append((self.scopes[home], node))

    def _emit_masked(self, node: ex.Masked, name: str) -> None:
        condition = self.value(node.cond)
        branches = []
        for branch in (node.body, node.other):
            with self.scope(certain=False) as inner:
                self.line(f"{name} = {self.value(branch)};")
            branches.append(inner)
        body, other = branches
        if len(body.lines) == 1 and len(other.lines) == 1:  # nothing in either branch needs the guard
            yes, no = (b.lines[0].removeprefix(f"{name} = ").removesuffix(";") for b in branches)
            self.line(f"const {register_type(node.dtype)} {name} = {condition} ? {yes} : {no};")
            return
        if len(other.lines) == 1:
            self.line(f"{register_type(node.dtype)} {other.lines[0]}")
            self.block(f"if ({condition})", body)
            return
        self.line(f"{register_type(node.dtype)} {name};")
        self.block(f"if ({condition})", body, "} else {")
        self.scopes[-1].lines.extend("  " + text for text in other.lines)
        self.line("}")

    def _text(self, node: ex.Expr) -> str:
        if isinstance(node, ex.Op):
            args = tuple(self.value(arg) for arg in node.args)
            if node.name == "to" and node.dtype.is_float and self._is_short(node.args[0]):
                return op_text("to", (f"(int32_t){args[0]}",), DType.I32, node.dtype)
            return op_text(node.name, args, node.args[-1].dtype, node.dtype)
        if isinstance(node, ex.Load):
            if len(node.index) != 1:
                raise CompilerBug(f"a kernel loads {node.buffer} by {len(node.index)} positions instead of one address")
            text = load_text(self.element(node.buffer, node.index[0], node.bind), node.dtype)
            guard = self.not_empty(node.bind)
            return f"{guard} ? {text} : {literal(0, node.dtype)}" if guard else text
        if isinstance(node, ex.Index):
            return self._as(self.index(node.expr, node.bind), node.dtype)
        raise CompilerBug(f"no C++ text for {type(node).__name__}")

    def _is_short(self, node: ex.Expr) -> bool:
        """Whether ``node`` is an index that surely fits 32 bits: AVX2 converts no longer integers to floats."""
        if not isinstance(node, ex.Index) or node.dtype is not DType.I64 or node.bind:
            return False
        reach = bounds(node.expr, self.extents)
        return reach is not None and reach[0] >= -LARGEST_INT32 and reach[1] <= LARGEST_INT32

    def _as(self, text: str, dtype: DType) -> str:
        return text if dtype is DType.I64 else op_text("to", (text,), DType.I64, dtype)

    def element(self, buffer: str, address: sympy.Expr, bind: Sequence[ex.Expr] = ()) -> str:
        """The memory element of ``buffer`` at ``address`` as a C++ lvalue."""
        if buffer not in self.buffers:
            raise CompilerBug(f"a kernel touches {buffer}, which is not among its buffers")
        lane = f"[{self.lane}]" if buffer in self.laned else ""
        return f"{self.buffers[buffer][0]}[{self.index(sympy.sympify(address), bind)}]{lane}"

    def not_empty(self, bind: Sequence[ex.Expr]) -> str:
        """The condition under which positions that ``wrap_index`` gives exist at all; empty when they surely do."""
        parts = (node for b in bind for node in ex.walk(b))
        sizes = {node.args[1] for node in parts if isinstance(node, ex.Op) and node.name == "wrap_index"}
        doubtful = [size for size in sizes if not (isinstance(size, ex.Const) and size.value > 0)]
        return " && ".join(sorted(f"{self.value(size)} > 0" for size in doubtful))

    def index(self, expr: sympy.Expr, bind: Sequence[ex.Expr] = ()) -> str:
        """An integer expression; ``q0..`` stand for the values of ``bind``."""
        bound = {ex.bound(n): self.value(b) for n, b in enumerate(bind)}

        def name(symbol: sympy.Symbol) -> str:
            if symbol in bound:
                return bound[symbol]
            if symbol not in self.symbols:
                raise CompilerBug(f"{symbol} is neither a loop variable nor a size of this kernel")
            return self.symbols[symbol].text

        return index_text(expr, name, self.extents)

    def forget_changed(self) -> None:
        """After a write: values read from buffers the kernel writes are read again when next needed."""
        for scope, node in self._changing:
            scope.names.pop(node, None)
        self._changing.clear()


def _may_divide_by_zero(expr: sympy.Expr) -> bool:
    return any(not node.args[1].is_Integer for node in expr.atoms(FloorDiv, Mod))
