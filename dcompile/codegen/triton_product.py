"""Prints a matrix product with what follows it: rows along dimension 0, columns along 1, the summed axis in a loop.

A program makes one tile of the result. Neighbouring programs make tiles of the same few rows of tiles, so that operands
are still in the second-level cache when they are read again.
"""

from __future__ import annotations

from dcompile.codegen.triton_kernel import KernelPrinter
from dcompile.codegen.triton_text import type_text
from dcompile.codegen.triton_values import INNER, OUTER, is_narrow
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import product
from dcompile.ir.kernel import Accumulator, Fold
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType

GROUP = 8
"""Rows of tiles that neighbouring programs share."""

_PRECISION = {"dot": "ieee", "dot_tf32": "tf32"}


class ProductPrinter(KernelPrinter):
    """As ``KernelPrinter``, for shapes that have a ``product``."""

    positions = (("x", OUTER), ("r", INNER))

    def print(self, program: str = "tl.program_id(0)") -> list[str]:
        """The lines of the body."""
        axes = self.shape.product
        fold, *rest = self.shape.body
        if axes is None or not isinstance(fold, Fold) or fold.lets or fold.writes:
            raise CompilerBug("a matrix product is not the first statement of its kernel")
        self._choose_tile(program, axes.rows, axes.columns, axes.batch)
        self._enter("x", OUTER, axes.rows)
        self._enter("r", INNER, axes.columns)
        (acc,) = fold.accumulators
        self.line(f"acc = tl.zeros([X, R], {type_text(acc.dtype)})")
        self._sum(acc, fold.axes)
        with self.scope():
            self.dims["acc"] = self.active
            self.scopes[-1].locals[acc.name] = "acc"
            for stmt in rest:
                self._statement(stmt)
        return self.lines

    def _choose_tile(
        self, program: str, rows: tuple[Axis, ...], columns: tuple[Axis, ...], batch: tuple[Axis, ...]
    ) -> None:
        """Which tile of which batch this program makes."""
        down, across = (product(tuple(size for _, size in axes)) for axes in (rows, columns))
        wide = "" if all(is_narrow(n) for n in (down, across)) else ".to(tl.int64)"
        self.line(f"program = {program}{wide}")
        self.line(f"down, across = tl.cdiv({self._size(down)}, X), tl.cdiv({self._size(across)}, R)")
        if batch:
            self.dims["batch"] = frozenset()
            self.line("batch = program // (down * across)")
            self.line("program = program % (down * across)")
            self._axes("batch", batch, None)
        self.line(f"first = program // ({GROUP} * across) * {GROUP}")
        self.line(f"shared = tl.minimum(down - first, {GROUP})")
        self.line(f"place = program % ({GROUP} * across)")
        self.line("x = (first + place % shared) * X + tl.arange(0, X)[:, None]")
        self.line("r = (place // shared) * R + tl.arange(0, R)[None, :]")

    def _sum(self, acc: Accumulator, axes: tuple[Axis, ...]) -> None:
        """The loop over blocks of the summed axis."""
        total = product(tuple(size for _, size in axes))
        if not is_narrow(total):
            raise CompilerBug(f"a matrix product sums {total} products")
        step, stages = self.launch.step, self.launch.stages
        self.line(f"for start in tl.range(0, {self._size(total)}, {step}, num_stages={stages}):")
        self.depth += 1
        texts = [self._operand(acc, n, axes) for n in range(2)]
        precision = f', input_precision="{_PRECISION[acc.kind]}"' if acc.expr.dtype is DType.F32 else ""
        self.line(f"acc = tl.dot({', '.join(texts)}, acc{precision})")
        self.depth -= 1

    def _operand(self, acc: Accumulator, number: int, axes: tuple[Axis, ...]) -> str:
        """The block of the first or second operand that this round needs, in the operands' own dtype."""
        name, dim = (("k", INNER), ("j", OUTER))[number]
        shape = (f"[X, {self.launch.step}]", f"[{self.launch.step}, R]")[number]
        other = (("x", OUTER), ("r", INNER))[number]
        self.positions = (other, (name, dim)) if dim == INNER else ((name, dim), other)
        both = frozenset({OUTER, INNER})
        with self.scope():
            expand = "[None, :]" if dim == INNER else "[:, None]"
            self.line(f"{name} = start + tl.arange(0, {self.launch.step}){expand}")
            self._enter_summed(name, dim, axes)
            root = acc.exprs[number]
            if isinstance(root, ex.Load) and not root.bind and root.buffer not in self.own:
                text = self._whole_load(root)
                dims = self.dims[text]
            else:
                text = self.value(root)
                dims = self.dims.get(text, frozenset())
                if existing := " & ".join(self._existing(frozenset({dim}))):
                    text = f"tl.where({existing}, {text}, 0.0)"
                    dims |= {dim}
                text = f"({text}).to({type_text(root.dtype)})"
            if dims != both:
                text = f"tl.broadcast_to({text}, {shape})"
        self.positions = (("x", OUTER), ("r", INNER))
        return text

    def _enter_summed(self, name: str, dim: int, axes: tuple[Axis, ...]) -> None:
        total = product(tuple(size for _, size in axes))
        self.dims[name] = self.dims[f"{name}_here"] = frozenset({dim})
        if isinstance(total, int) and total % self.launch.step == 0:
            self.whole.add(name)
        else:
            self.line(f"{name}_here = {name} < {self._size(total)}")
        self._axes(name, axes, dim)

    def _whole_load(self, node: ex.Load) -> str:
        """A load as the element type: matrix units take 16-bit floats as they are."""
        address, dims = self.index(node.index[0])
        mask = " & ".join(self._existing(dims))
        guard = f", mask={mask}, other=0" if mask else ""
        return self.define(f"tl.load({self._pointer(node.buffer, address, dims, dims)}{guard})", dims)

    def _existing(self, dims: frozenset[int]) -> list[str]:
        return [f"{name}_here" for name, dim in self.positions if dim in dims and name not in self.whole]

    def _pointer(self, buffer: str, address: str, have: frozenset[int], want: frozenset[int]) -> str:
        zeros = [f"{name} * 0" for name, dim in self.positions if dim in want - have]
        return f"{buffer} + {' + '.join([f'({address})', *zeros])}" if zeros else f"{buffer} + {address}"


__all__ = ["GROUP", "ProductPrinter"]
