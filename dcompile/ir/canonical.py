"""Kernels under names that depend on structure only, so that identical kernels are printed and compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.index import SIGNED, as_expr, as_size, symbol
from dcompile.ir.kernel import Fold, Kernel, Let, Nest, ScanLoop, Scratch, Stmt, Write, expressions, statements
from dcompile.ir.nodes import Axis
from dcompile.ir.text import print_node
from dcompile.ir.text_node import print_def
from dcompile.ir.types import Origin, Size, Value


@dataclass(frozen=True)
class Canonical:
    """A kernel's structure and what fills its places.

    Attributes:
        key: text of the renamed kernel with the layout of every buffer; equal exactly for kernels that do the same to
            buffers of the same dtypes, shapes, strides and devices. Origins do not count.
        buffers: the kernel's own buffer names in parameter order: operands, then outs. ``buffers[n]`` is ``b{n}`` in
            ``kernel``; an out that is the next version of a target is a parameter beside its target.
        symbols: its own size symbols in parameter order; ``symbols[n]`` is ``n{n}`` in ``kernel``, ``z_n{n}`` if it may
            be negative (``size_parameters``).
        kernel: the renamed kernel. Loop variables are ``v0..``, scalars ``e0..``, scratch ``m0..``, in order of
            definition, every definition under its own name.
    """

    key: str
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    kernel: Kernel


def canonical(kernel: Kernel, values: Mapping[str, Value]) -> Canonical:
    """The structure of ``kernel``; ``values`` holds at least its operands.

    Raises:
        KeyError: an operand is not in ``values``.
    """
    known = {name: values[name] for name in kernel.operands} | {out.name: out for out in kernel.outs}
    buffers = tuple(known)
    symbols = _size_symbols(kernel, tuple(known.values()))
    renamer = _Renamer({name: f"b{n}" for n, name in enumerate(buffers)}, size_parameters(symbols))
    names = renamer.buffers
    renamed = Kernel(
        origin=Origin(),
        outs=tuple(renamer.value(out) for out in kernel.outs),
        body=renamer.block(kernel.body),
        targets=tuple(names[t] if t is not None else None for t in kernel.targets),
        inplace=tuple((names[out], names[operand]) for out, operand in kernel.inplace),
    )
    layouts = "".join(print_def(renamer.value(value)) + "\n" for value in known.values())
    return Canonical(layouts + print_node(renamed), buffers, symbols, renamed)


def size_parameters(symbols: tuple[sympy.Symbol, ...]) -> dict[sympy.Symbol, sympy.Symbol]:
    """The symbol in a canonical kernel of each of its size symbols; what may be negative stays so."""
    return {s: symbol(f"{'' if s.is_nonnegative else SIGNED}n{n}") for n, s in enumerate(symbols)}


def _size_symbols(kernel: Kernel, values: tuple[Value, ...]) -> tuple[sympy.Symbol, ...]:
    """Size symbols in order of first use, by name within one expression: buffers' layouts first, then the body."""
    loops = {var for s in statements(kernel.body) if isinstance(s, Nest | Fold | ScanLoop) for var, _ in s.axes}
    sizes: list[Size] = [size for value in values for size in (*value.shape, *value.stride)]
    for stmt in statements(kernel.body):
        if isinstance(stmt, Nest | Fold | ScanLoop):
            sizes.extend(size for _, size in stmt.axes)
    found: dict[sympy.Symbol, None] = {}
    for size in sizes:
        _note(as_expr(size), 0, loops, found)
    for stmt in statements(kernel.body):
        if isinstance(stmt, Write):
            _note(stmt.address, len(stmt.bind), loops, found)
    for root in expressions(kernel.body):
        for node in ex.walk(root):
            if isinstance(node, ex.Index):
                _note(node.expr, len(node.bind), loops, found)
            elif isinstance(node, ex.Load):
                for position in node.index:
                    _note(position, len(node.bind), loops, found)
    return tuple(found)


def _note(expr: sympy.Expr, bound: int, loops: set[sympy.Symbol], found: dict[sympy.Symbol, None]) -> None:
    own = loops | {ex.bound(n) for n in range(bound)}
    found.update(dict.fromkeys(sorted(expr.free_symbols - own, key=lambda s: s.name)))


class _Renamer:
    """Renames definitions as it meets them; scopes follow the kernel's blocks."""

    def __init__(self, buffers: dict[str, str], sizes: dict[sympy.Symbol, sympy.Symbol]) -> None:
        self.buffers = buffers
        self.symbols: dict[sympy.Symbol, sympy.Expr] = dict(sizes)
        self.scalars: dict[str, str] = {}
        self._counts = {"v": 0, "e": 0, "m": 0}

    def value(self, value: Value) -> Value:
        return replace(
            value,
            name=self.buffers[value.name],
            shape=tuple(self.size(n) for n in value.shape),
            stride=tuple(self.size(n) for n in value.stride),
        )

    def size(self, size: Size) -> Size:
        return as_size(as_expr(size).xreplace(self.symbols))

    def expr(self, root: ex.Expr) -> ex.Expr:
        def leaf(node: ex.Expr) -> ex.Expr | None:
            if isinstance(node, ex.Load):
                index = tuple(i.xreplace(self.symbols) for i in node.index)
                return ex.load(self.buffers.get(node.buffer, node.buffer), index, node.dtype, node.bind)
            if isinstance(node, ex.Index):
                return ex.index(node.expr.xreplace(self.symbols), node.dtype, node.bind)
            if isinstance(node, ex.Local):
                return ex.local(self.scalars.get(node.name, node.name), node.dtype)
            return None

        return ex.transform(root, leaf)

    def block(self, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        outer = self.buffers, self.symbols, self.scalars
        self.buffers, self.symbols, self.scalars = dict(outer[0]), dict(outer[1]), dict(outer[2])
        renamed = tuple(self._stmt(stmt) for stmt in body)
        self.buffers, self.symbols, self.scalars = outer
        return renamed

    def _fresh(self, prefix: str) -> str:
        self._counts[prefix] += 1
        return f"{prefix}{self._counts[prefix] - 1}"

    def _axes(self, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        renamed = []
        for var, size in axes:
            extent = self.size(size)
            self.symbols[var] = symbol(self._fresh("v"))
            renamed.append((self.symbols[var], extent))
        return tuple(renamed)

    def _stmt(self, stmt: Stmt) -> Stmt:
        if isinstance(stmt, Nest):
            outer = dict(self.symbols)
            nest = Nest(self._axes(stmt.axes), stmt.roles, self.block(stmt.body))
            self.symbols = outer
            return nest
        if isinstance(stmt, Let):
            return self._let(stmt)
        if isinstance(stmt, Write):
            return self._write(stmt)
        if isinstance(stmt, Scratch):
            self.buffers[stmt.name] = self._fresh("m")
            return replace(stmt, name=self.buffers[stmt.name])
        return self._scan(stmt) if isinstance(stmt, ScanLoop) else self._fold(stmt)

    def _let(self, stmt: Let) -> Let:
        value = self.expr(stmt.expr)
        self.scalars[stmt.name] = self._fresh("e")
        return Let(self.scalars[stmt.name], value)

    def _write(self, stmt: Write) -> Write:
        return replace(
            stmt,
            buffer=self.buffers.get(stmt.buffer, stmt.buffer),
            address=stmt.address.xreplace(self.symbols),
            expr=self.expr(stmt.expr),
            bind=tuple(self.expr(b) for b in stmt.bind),
        )

    def _fold(self, fold: Fold) -> Fold:
        symbols, scalars = dict(self.symbols), dict(self.scalars)
        axes = self._axes(fold.axes)
        lets = tuple(self._let(let) for let in fold.lets)
        values = [a.map(self.expr) for a in fold.accumulators]
        writes = tuple(self._write(w) for w in fold.writes)
        self.symbols, self.scalars = symbols, scalars
        accumulators = []
        for accumulator in values:
            self.scalars.update({name: self._fresh("e") for name in accumulator.names})
            name, *more = (self.scalars[name] for name in accumulator.names)
            accumulators.append(replace(accumulator, name=name, more=tuple(more)))
        return Fold(axes, fold.roles, tuple(accumulators), lets, writes)

    def _scan(self, scan: ScanLoop) -> ScanLoop:
        symbols, scalars = dict(self.symbols), dict(self.scalars)
        axes = self._axes(scan.axes)
        lets = tuple(self._let(let) for let in scan.lets)
        exprs = tuple(self.expr(e) for e in scan.exprs)
        self.scalars.update({name: self._fresh("e") for name in scan.names})
        names = tuple(self.scalars[name] for name in scan.names)
        writes = tuple(self._write(w) for w in scan.writes)
        self.symbols, self.scalars = symbols, scalars
        tiles = replace(scan.tiles, state=self.buffers.get(scan.tiles.state, scan.tiles.state)) if scan.tiles else None
        return ScanLoop(axes[0], names, exprs, scan.combine, scan.start, lets, writes, tiles)
