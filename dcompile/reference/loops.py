"""Loop nodes and kernels, statement by statement.

Parallel and simd loops are independent by definition, so every statement runs for all their iterations before the next
begins. Serial nests run one iteration after the other. Folds are evaluated over all their iterations at once: their
iterations share nothing but the accumulators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from dcompile.errors import CompilerBug
from dcompile.ir.kernel import Fold, Kernel, Let, Nest, Role, ScanLoop, Scratch, Stmt, Write
from dcompile.ir.nodes import Axis, Pointwise, Reduction, Scan, Store, View
from dcompile.reference.evaluate import Evaluator, Frame, flat_memory, fold_grid, scan_grid, size_value

Sizes = Mapping[sympy.Symbol, int]
Tensors = Mapping[str, Tensor]


def pointwise(node: Pointwise, out: Tensor, tensors: Tensors, sizes: Sizes) -> None:
    """Write ``out[axes] = expr``."""
    frame = Frame(sizes, tensors).inside(node.axes)
    out.copy_(_outermost_first(Evaluator(frame).full(node.expr)))


def reduction(node: Reduction, outs: Sequence[Tensor], tensors: Tensors, sizes: Sizes) -> None:
    """Write ``out[axes] = fold(kind, expr over raxes)``, for every result of the kind."""
    outer = Frame(sizes, tensors).inside(node.axes)
    inner = outer.inside(node.raxes)
    values = [Evaluator(inner).full(e) for e in node.exprs]
    extents = tuple(size_value(n, sizes) for _, n in node.raxes)
    for out, found in zip(outs, fold_grid(node.kind, values, outer.grid, extents), strict=True):
        out.copy_(_outermost_first(found))


def scan(node: Scan, outs: Sequence[Tensor], tensors: Tensors, sizes: Sizes) -> None:
    """Write the running folds along the scanned axis, each in its accumulation dtype, rounded once."""
    frame = Frame(sizes, tensors).inside(node.axes)
    values = [Evaluator(frame).full(e) for e in node.exprs]
    level = next(k for k, (var, _) in enumerate(node.axes) if var == node.along)
    along = len(node.axes) - 1 - level
    for out, found in zip(outs, scan_grid(node.combine, node.start, values, along), strict=True):
        out.copy_(_outermost_first(found))


def store(node: Store, target: Tensor, tensors: Tensors, sizes: Sizes) -> None:
    """Write ``target[index]`` for all axes, everything read before anything is written."""
    evaluate = Evaluator(Frame(sizes, tensors).inside(node.axes))
    index = [evaluate.position(i, node.bind) for i in node.index]
    address = evaluate.address(node.target, target, index)
    _write(target, address, evaluate.full(node.expr), node.mode, evaluate.frame.grid)


def view(node: View, base: Tensor, sizes: Sizes) -> Tensor:
    """An alias of ``base`` where the index map is affine in its memory, otherwise a copy with the layout of ``out``.

    Raises:
        CompilerBug: a position outside the base.
    """
    shape = tuple(size_value(n, sizes) for n in node.out.shape)
    stride = tuple(size_value(n, sizes) for n in node.out.stride)
    evaluate = Evaluator(Frame(sizes, {node.base: base}).inside(node.axes))
    index = [evaluate.position(i, ()) for i in node.index]
    address = _outermost_first(evaluate.address(node.base, base, index).expand(evaluate.frame.grid))
    if address.numel() == 0:
        return torch.empty_strided(shape, stride, dtype=base.dtype)
    steps = tuple(
        int(address.select(dim, 1).flatten()[0] - address.flatten()[0]) if n > 1 else stride[dim]
        for dim, n in enumerate(shape)
    )
    first = int(address.flatten()[0])
    affine = torch.tensor(first)
    for dim, (n, step) in enumerate(zip(shape, steps, strict=True)):
        affine = affine + (torch.arange(n) * step).reshape(-1, *[1] * (len(shape) - dim - 1))
    if min(steps, default=0) >= 0 and torch.equal(affine.expand(shape), address):
        return base.as_strided(shape, steps, base.storage_offset() + first)
    return torch.empty_strided(shape, stride, dtype=base.dtype).copy_(flat_memory(base).take(address))


def kernel(node: Kernel, tensors: Tensors, sizes: Sizes) -> None:
    """Run a kernel; ``tensors`` holds its operands and, under their names, its outs."""
    _run(node.body, Frame(sizes, tensors, flat=True))


def _run(body: tuple[Stmt, ...], frame: Frame) -> None:
    for stmt in body:
        if isinstance(stmt, Nest):
            _run_nest(stmt.axes, stmt.roles, stmt.body, frame)
        elif isinstance(stmt, Let):
            frame.scalars[stmt.name] = Evaluator(frame)(stmt.expr)
        elif isinstance(stmt, Write):
            _run_write(stmt, frame)
        elif isinstance(stmt, Scratch):
            _run_scratch(stmt, frame)
        elif isinstance(stmt, ScanLoop):
            _run_scan(stmt, frame)
        else:
            _run_fold(stmt, frame)


def _run_nest(axes: tuple[Axis, ...], roles: tuple[Role, ...], body: tuple[Stmt, ...], frame: Frame) -> None:
    if not axes:
        _run(body, replace(frame, scalars=dict(frame.scalars), scratch=dict(frame.scratch)))
    elif roles[0] is Role.SERIAL:
        for value in range(size_value(axes[0][1], frame.sizes)):
            _run_nest(axes[1:], roles[1:], body, frame.at(axes[0][0], value))
    else:
        _run_nest(axes[1:], roles[1:], body, frame.inside(axes[:1]))


def _run_write(stmt: Write, frame: Frame) -> None:
    evaluate = Evaluator(frame)
    position = evaluate.position(stmt.address, stmt.bind)
    if stmt.buffer in frame.scratch:
        memory, size, first = frame.scratch[stmt.buffer]
        inside = Evaluator(replace(frame, tensors={stmt.buffer: memory[:size]}))
        address = first + inside.address(stmt.buffer, memory[:size], [position])
        _write(memory, address, evaluate.full(stmt.expr), stmt.mode, frame.grid)
        return
    if stmt.buffer not in frame.tensors:
        raise CompilerBug(f"buffer {stmt.buffer} is written but not defined")
    target = frame.tensors[stmt.buffer]
    address = evaluate.address(stmt.buffer, target, [position])
    _write(target, address, evaluate.full(stmt.expr), stmt.mode, frame.grid)


def _run_scratch(stmt: Scratch, frame: Frame) -> None:
    copies = math.prod(frame.grid)
    memory = poison(torch.empty(copies * stmt.size, dtype=stmt.dtype.torch))
    frame.scratch[stmt.name] = (memory, stmt.size, (torch.arange(copies) * stmt.size).reshape(frame.grid))


def _run_fold(stmt: Fold, frame: Frame) -> None:
    inner = frame.inside(stmt.axes)
    for let in stmt.lets:
        inner.scalars[let.name] = Evaluator(inner)(let.expr)
    values = [[Evaluator(inner).full(e) for e in a.exprs] for a in stmt.accumulators]
    for write in stmt.writes:
        _run_write(write, inner)
    extents = tuple(size_value(n, frame.sizes) for _, n in stmt.axes)
    for accumulator, entering in zip(stmt.accumulators, values, strict=True):
        found = fold_grid(accumulator.kind, entering, frame.grid, extents)
        frame.scalars.update(zip(accumulator.names, found, strict=True))


def _run_scan(stmt: ScanLoop, frame: Frame) -> None:
    """All iterations at once: they share nothing but the running values."""
    inner = frame.inside(stmt.axes)
    for let in stmt.lets:
        inner.scalars[let.name] = Evaluator(inner)(let.expr)
    values = [Evaluator(inner).full(e) for e in stmt.exprs]
    inner.scalars.update(zip(stmt.names, scan_grid(stmt.combine, stmt.start, values, 0), strict=True))
    for write in stmt.writes:
        _run_write(write, inner)


def _write(target: Tensor, address: Tensor, value: Tensor, mode: str, grid: tuple[int, ...]) -> None:
    """Write or add the value of every iteration."""
    memory = flat_memory(target)
    address, value = address.expand(grid).reshape(-1), value.to(target.dtype).reshape(-1)
    memory.index_put_((address,), value, accumulate=mode == "add")


def _outermost_first(grid: Tensor) -> Tensor:
    """A grid with the outermost loop as dimension 0."""
    return grid.permute(tuple(reversed(range(grid.ndim))))


def poison(tensor: Tensor) -> Tensor:
    """Fill with values that no program computes by accident, so that a read of memory never written shows."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(math.nan)
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max - 41)
