"""Scalar expressions over whole index grids: loop variables are index tensors, loads are gathers.

A frame holds one tensor a loop variable. The variable of loop level ``k`` (0 outermost) has shape ``(n, 1, ..., 1)``
with ``k`` ones, so that whatever was computed in outer loops broadcasts in inner ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import sympy
import torch
from torch import Tensor

from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.index import FloorDiv, Mod
from dcompile.ir.ops import PRODUCTS, WELFORD
from dcompile.ir.types import Size
from dcompile.reference import scalars

Number = int | Tensor


@dataclass(frozen=True)
class Frame:
    """Where an expression is evaluated.

    Attributes:
        sizes: run-time values of the size symbols.
        tensors: buffers that may be loaded. Views share their storage.
        grid: sizes of the enclosing loops that are evaluated at once, innermost first.
        loops: value of each loop variable: a number, or a tensor as the module describes.
        scalars: named scalars.
        flat: inside a kernel, where buffers are addressed by one flat address.
        scratch: private memory: flat storage, elements of one copy, and first element of each iteration's copy.
    """

    sizes: Mapping[sympy.Symbol, int]
    tensors: Mapping[str, Tensor]
    flat: bool = False
    grid: tuple[int, ...] = ()
    loops: Mapping[sympy.Symbol, Number] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    def inside(self, axes: tuple[tuple[sympy.Symbol, Size], ...]) -> Frame:
        """The frame inside further loops that are evaluated at once, outermost first."""
        grid, loops = self.grid, dict(self.loops)
        for var, extent in axes:
            n = size_value(extent, self.sizes)
            loops[var] = torch.arange(n).reshape(n, *[1] * len(grid))
            grid = (n, *grid)
        return replace(self, grid=grid, loops=loops, scalars=dict(self.scalars), scratch=dict(self.scratch))

    def at(self, var: sympy.Symbol, value: int) -> Frame:
        """The frame of one iteration of a serial loop."""
        return replace(self, loops={**self.loops, var: value}, scalars=dict(self.scalars), scratch=dict(self.scratch))


def size_value(size: Size, sizes: Mapping[sympy.Symbol, int]) -> int:
    """The run-time value of a size.

    Raises:
        CompilerBug: it holds a symbol that no input defines, or is no integer.
    """
    if isinstance(size, int):
        return size
    found = size.xreplace({s: sympy.Integer(v) for s, v in sizes.items()})
    if not found.is_Integer:
        raise CompilerBug(f"size {size} is {found} for {dict(sizes)}")
    return int(found)


def index_value(expr: sympy.Expr, values: Mapping[sympy.Symbol, Number]) -> Number:
    """An index expression of numbers and index tensors.

    Raises:
        CompilerBug: an unknown symbol, or a function that index expressions do not have.
    """
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        if expr not in values:
            raise CompilerBug(f"index variable {expr} is not defined here")
        return values[expr]
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        if not coefficient.is_Integer:
            scaled = index_value(coefficient.p * rest, values)
            return scaled // int(coefficient.q)
    args = [index_value(arg, values) for arg in expr.args]
    if isinstance(expr, sympy.Add):
        return reduce(lambda a, b: a + b, args)
    if isinstance(expr, sympy.Mul):
        return reduce(lambda a, b: a * b, args)
    if isinstance(expr, sympy.Pow):
        return args[0] ** args[1]
    if isinstance(expr, FloorDiv | Mod):
        a, b = (torch.as_tensor(arg, dtype=torch.int64) for arg in args)
        found = torch.div(a, b, rounding_mode="floor") if isinstance(expr, FloorDiv) else torch.remainder(a, b)
        return found if found.ndim else int(found)
    if isinstance(expr, sympy.Max | sympy.Min):
        pick = torch.maximum if isinstance(expr, sympy.Max) else torch.minimum
        return reduce(pick, [torch.as_tensor(arg, dtype=torch.int64) for arg in args])
    raise CompilerBug(f"index expression {expr} holds {type(expr).__name__}")


class Evaluator:
    """Evaluates expressions in one frame; sub-expressions are evaluated once."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._done: dict[tuple[ex.Expr, int], Tensor] = {}
        self._masks: list[Tensor] = []

    def __call__(self, root: ex.Expr, mask: Tensor | None = None) -> Tensor:
        """The value of ``root``, broadcastable to the frame's grid; where ``mask`` is False it is arbitrary.

        Raises:
            CompilerBug: a load outside its buffer.
            IndexError, ZeroDivisionError: as ``scalars.apply``.
        """
        key = id(mask) if mask is not None else 0
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if (node, key) in self._done:
                continue
            if ready:
                self._done[node, key] = self._value(node, mask, key)
                continue
            stack.append((node, True))
            children = (node.cond, node.other) if isinstance(node, ex.Masked) else node.children
            stack.extend((child, False) for child in children)
        return self._done[root, key]

    def full(self, root: ex.Expr) -> Tensor:
        """The value of ``root`` in every iteration of the grid."""
        return self(root).expand(self.frame.grid)

    def position(self, expr: sympy.Expr, bind: tuple[ex.Expr, ...], mask: Tensor | None = None) -> Tensor:
        """An index expression with the values of its bindings, as i64."""
        values: dict[sympy.Symbol, Number] = {**self.frame.sizes, **self.frame.loops}
        values.update({ex.bound(n): self(b, mask).to(torch.int64) for n, b in enumerate(bind)})
        return torch.as_tensor(index_value(expr, values), dtype=torch.int64)

    def _value(self, node: ex.Expr, mask: Tensor | None, key: int) -> Tensor:
        if isinstance(node, ex.Const):
            return torch.tensor(node.value, dtype=node.dtype.torch)
        if isinstance(node, ex.Index):
            return self.position(node.expr, node.bind, mask).to(node.dtype.torch)
        if isinstance(node, ex.Local):
            if node.name not in self.frame.scalars:
                raise CompilerBug(f"scalar {node.name} is read before it is defined, or outside its nest")
            return self.frame.scalars[node.name]
        if isinstance(node, ex.Load):
            return self._load(node, mask)
        if isinstance(node, ex.Masked):
            cond = self._done[node.cond, key]
            inner = cond if mask is None else cond & mask
            self._masks.append(inner)  # keeps id(inner) its own
            return torch.where(cond, self(node.body, inner), self._done[node.other, key])
        if isinstance(node, ex.Op):
            args = [self._done[arg, key] for arg in node.args]
            if mask is not None and node.name in scalars.DIVISIONS:
                args[1] = torch.where(mask, args[1], torch.ones_like(args[1]))
            if mask is not None and node.name == "wrap_index":
                args = [torch.where(mask, args[0], 0), torch.where(mask, args[1], 1)]
            return scalars.apply(node.name, args, node.dtype)
        raise CompilerBug(f"{type(node).__name__} is not an expression")

    def _load(self, node: ex.Load, mask: Tensor | None) -> Tensor:
        index = [self.position(i, node.bind, mask) for i in node.index]
        if node.buffer in self.frame.scratch:
            memory, size, first = self.frame.scratch[node.buffer]
            address = first + self._inside(node.buffer, index[0], size, mask)
            return memory.take(address)
        tensor = self._tensor(node.buffer)
        address = self.address(node.buffer, tensor, index, mask)
        memory = flat_memory(tensor)
        return memory.take(address) if memory.numel() else torch.zeros(address.shape, dtype=tensor.dtype)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.frame.tensors:
            raise CompilerBug(f"buffer {name} is not defined here")
        return self.frame.tensors[name]

    def address(self, name: str, tensor: Tensor, index: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Element address, counted from the first element of ``tensor``, of one position a dimension (kernels: of one
        flat address).

        Raises:
            CompilerBug: the position is outside the buffer where ``mask`` holds.
        """
        if self.frame.flat:
            return self._inside(name, index[0], extent(tensor), mask)
        if len(index) != tensor.ndim:
            raise CompilerBug(f"{name} has {tensor.ndim} dimensions but is read at {len(index)} positions")
        total = torch.tensor(0)
        for position, size, stride in zip(index, tensor.shape, tensor.stride(), strict=True):
            total = total + self._inside(name, position, size, mask) * stride
        return total

    def _inside(self, name: str, position: Tensor, size: int, mask: Tensor | None) -> Tensor:
        wrong = (position < 0) | (position >= size)
        used = wrong if mask is None else wrong & mask
        if bool((used & torch.ones(self.frame.grid, dtype=torch.bool)).any()):  # an empty grid touches nothing
            worst = int((position + torch.zeros_like(used, dtype=torch.int64))[used].flatten()[0])
            raise CompilerBug(f"{name} is touched at {worst}, outside 0..{size - 1}")
        return torch.where(wrong, 0, position)


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last one addressed, 0 when empty."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def flat_memory(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` from its first to its last element, as one dimension that shares its storage."""
    return tensor.as_strided((extent(tensor),), (1,), tensor.storage_offset())


def fold_grid(
    kind: str, values: Sequence[Tensor], outer: tuple[int, ...], inner: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Fold the innermost loops row-major; ``inner``: their sizes, outermost first; ``outer``: the grid around them.

    One result each the kind has (``ops.WELFORD``: three).
    """

    def rows(value: Tensor) -> Tensor:
        full = value.expand((*reversed(inner), *outer))
        ordered = full.permute(*reversed(range(len(inner))), *range(len(inner), len(inner) + len(outer)))
        return ordered.reshape(math.prod(inner), *outer)

    if kind in WELFORD:
        return scalars.welford(*(rows(value) for value in values))
    if kind in PRODUCTS:
        return (scalars.dot(*(rows(value) for value in values)),)
    return (scalars.fold(kind, rows(values[0])),)


def scan_grid(
    combine: tuple[ex.Expr, ...], start: tuple[ex.Const, ...], values: Sequence[Tensor], along: int
) -> list[Tensor]:
    """Inclusive scans of ``values`` over grid dimension ``along``, one element after the other."""
    names = [(f"left{k}", f"right{k}") for k in range(len(values))]
    if values[0].numel() == 0:
        return list(values)
    running = [torch.full_like(v.select(along, 0), c.value) for v, c in zip(values, start, strict=False)]
    found: list[list[Tensor]] = []
    for at in range(values[0].shape[along]):
        entering = [v.select(along, at) for v in values]
        if running:
            frame = Frame({}, {}, grid=tuple(entering[0].shape))
            for (before, after), a, b in zip(names, running, entering, strict=True):
                frame.scalars.update({before: a, after: b})
            entering = [Evaluator(frame).full(rule) for rule in combine]
        running = entering
        found.append(running)
    return [torch.stack(parts, along) for parts in zip(*found, strict=True)]
