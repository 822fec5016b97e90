"""How each kernel is cut into programs: block sizes and warps by shape, as data. The printer decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import sympy

from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.graph import hint
from dcompile.ir.index import product
from dcompile.ir.kernel import (
    Fold,
    Kernel,
    Let,
    Nest,
    Role,
    ScanLoop,
    Scratch,
    Stmt,
    Tiles,
    Write,
    expressions,
    statements,
)
from dcompile.ir.nodes import Axis
from dcompile.ir.ops import PRODUCTS
from dcompile.ir.types import DType, Size

PROGRAMS = 264
"""Programs that fill the GPU: two for each of an H200's 132 multiprocessors."""

PERSISTENT = 16384
"""Longest inner range held in registers at once: 32 f32 values in each of 512 threads."""

SCRATCH_PERSISTENT = 32768
"""The same for kernels with scratch memory, which exists in registers only: the scheduler's limit of bytes a row, so
the longest row that can have scratch."""

FLAT = ((2**17, 256, 4), (2**62, 512, 4))
"""(elements up to, block, warps) of kernels without an inner range: small ones are spread over more programs, large
ones give a thread 4 elements, one 16-byte access of f32. On an H100, SwiGLU of bf16: 535 us (16 elements a thread 539,
2 elements 642)."""

HEAVY_FLOPS, HEAVY = 16, (1024, 2)
"""Large kernels of so much arithmetic an element give a thread 16: addresses are computed for 8 elements at once. On an
H100, GELU with bias of bf16: 386 us (4 elements a thread 447, 8 elements 414)."""

ROW_TILE = 2048
"""Elements of a program that holds several short rows."""

LOOP_BLOCK = 2048
"""Elements of a long row in one step of the loop over it, 8 in each of 256 threads. On an H100: 64 rows of 2**20 f32
109 us (blocks of 4096 132, of 8192 239), cross entropy over 32768 494 us (624, 576)."""

COLUMN_TILE = 2048
"""Elements of one step of a column reduction. On an H100: 2**20 rows of 64 f32 100 us (steps of 4096 133, of 8192 107),
2**16 rows of 1024 107 (104, 102)."""

TILE, TILE_WARPS = (64, 64), 8
"""Positions of a tile along its two axes: 64 of 2 bytes are a whole cache line, 16 elements a thread."""

STRIP_TILE, STRIP_COLUMNS, STRIP_EACH, STRIP_STAGES = 2048, 1024, 512, 3
"""Elements that a program in strips takes at once, the widest block of columns without reductions of rows, elements of
a warp (16 a thread), and rounds in flight. On an H100, backward of norms over 65536 rows of 4096 bf16: 590 us with 3
rounds, 630 to 650 with 2, 600 to 690 with 1; 540 us would be the bandwidth of a copy."""

STRIP_ROW_EACH = 256
"""Fewest elements of one row for each warp: a thread then holds 8 neighbours of what is loaded for every row, as of
what is loaded for one. Triton computes everything twice where the two differ: gradient of GELU with bias 960 us."""

COLUMN_WIDTH = (64, 16)
"""Columns of a program: widest first; 16 f32 are two 32-byte sectors, less wastes bandwidth."""


@dataclass(frozen=True)
class Launch:
    """One kernel's cut.

    Attributes:
        block: outer positions of a program, a power of two.
        inner: inner positions handled at once, a power of two; 0 for kernels without an inner range.
        persistent: ``inner`` covers the whole inner range, so that rows stay in registers between passes.
        num_warps: warps of 32 threads of a program.
        stages: rounds of a loop whose loads are in flight at once; 1 leaves loads where they are.
        step: of a matrix product, how much of the summed axis it takes at once.
    """

    block: int
    inner: int
    persistent: bool
    num_warps: int
    stages: int = 1
    step: int = 0


@dataclass(frozen=True)
class ProductAxes:
    """The outer axes of a matrix product: those of both operands, of the first and of the second alone."""

    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    dtype: DType


@dataclass(frozen=True)
class Strips:
    """What a kernel in strips has around its rows.

    Attributes:
        rows: axes of the rows of one strip, in order.
        memory: of running values, one a column.
        start: their first values.
        end: what becomes of them.
    """

    rows: tuple[Axis, ...]
    memory: tuple[Scratch, ...]
    start: tuple[Write, ...]
    end: tuple[Write, ...]


@dataclass(frozen=True)
class Shape:
    """A kernel body seen as outer positions around inner ranges.

    Attributes:
        outer: axes of the one nest around everything; empty for a single position.
        inner: axes of the folds and nests inside, the same for all; None if there are none.
        body: the statements of one outer position.
        column: neighbouring outer positions are neighbours in memory.
        scratch: has scratch memory.
        tiled: a kernel without folds whose accesses run along different axes: programs are tiles of the last outer
            axis and the inner one, so that both are read and written along memory. In strips: a program takes a block
            of columns.
        strips: outer positions are strips of rows; ``body`` is that of one row.
        tiles: of a scan whose inner range is divided among programs.
        product: of a matrix product, whose inner range is summed in blocks; a program makes a tile of the result.
        row_blocks: ``tiled``, but because there are values of a whole row, which each program computes once a row.
    """

    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...] | None
    body: tuple[Stmt, ...]
    column: bool
    scratch: bool
    tiled: bool = False
    strips: Strips | None = None
    tiles: Tiles | None = None
    product: ProductAxes | None = None
    row_blocks: bool = False


def shape_of(kernel: Kernel) -> Shape:
    """The form of a kernel body.

    Raises:
        CompilerBug: nests deeper than outer positions around inner ranges, which fusion does not emit.
    """
    outer: tuple[Axis, ...] = ()
    body, column = kernel.body, False
    if len(body) == 1 and isinstance(body[0], Nest):
        outer, body = body[0].axes, body[0].body
        column = bool(body) and kernel.body[0].roles[-1:] == (Role.SIMD,)  # type: ignore[union-attr]
        if (in_strips := _strips(outer, body)) is not None:
            return in_strips
    ranges = [stmt for stmt in body if isinstance(stmt, Nest | Fold | ScanLoop)]
    for stmt in ranges:
        if isinstance(stmt, Nest) and not all(isinstance(s, Let | Write) for s in stmt.body):
            raise CompilerBug("a GPU kernel nests loops deeper than outer positions around inner ranges")
        if tuple(size for _, size in stmt.axes) != tuple(size for _, size in ranges[0].axes):
            raise CompilerBug("a GPU kernel has inner ranges of different extents")
    inner = ranges[0].axes if ranges else None
    if inner is None and (tile := _tile(outer, body)) is not None:
        rest, last = tile
        return Shape(rest, (last,), (Nest((last,), (Role.SIMD,), body),), False, False, tiled=True)
    if inner is None and _has_row_values(outer, body):
        nest = Nest(outer[-1:], (Role.SIMD,), body)
        return Shape(outer[:-1], outer[-1:], (nest,), False, False, tiled=True, row_blocks=True)
    if inner is not None:
        body = tuple(_over(stmt, inner) for stmt in body)
    tiles = next((s.tiles for s in ranges if isinstance(s, ScanLoop)), None)
    if tiles is not None and len(ranges) > 1:
        raise CompilerBug("a GPU kernel has other inner ranges beside a scan in tiles")
    scratch = any(isinstance(s, Scratch) for s in body)
    return Shape(
        outer, inner, body, column and inner is not None, scratch, tiles=tiles, product=_product(outer, ranges)
    )


def _product(outer: tuple[Axis, ...], ranges: Sequence[Stmt]) -> ProductAxes | None:
    """The axes of a matrix product; None if there is none.

    Raises:
        CompilerBug: something else is folded beside it.
    """
    accumulators = [acc for s in ranges if isinstance(s, Fold) for acc in s.accumulators]
    if not any(acc.kind in PRODUCTS for acc in accumulators):
        return None
    if len(ranges) > 1 or len(accumulators) > 1:
        raise CompilerBug("a GPU kernel folds something beside a matrix product")
    free = [{v for load in ex.loads(e) for i in load.index for v in i.free_symbols} for e in accumulators[0].exprs]
    kinds: dict[tuple[bool, bool], list[Axis]] = {}
    for axis in outer:
        kinds.setdefault((axis[0] in free[0], axis[0] in free[1]), []).append(axis)
    rows = (*kinds.get((True, False), ()), *kinds.get((False, False), ()))
    return ProductAxes(
        tuple(kinds.get((True, True), ())), rows, tuple(kinds.get((False, True), ())), accumulators[0].expr.dtype
    )


SHORTEST_ROW = 256
"""Elements of a row from which a value of the whole row is worth computing once a row."""


def _has_row_values(outer: tuple[Axis, ...], body: tuple[Stmt, ...]) -> bool:
    """Whether a flat body over long rows reads what depends on the row alone: a channel's mean, a token's label."""
    if len(outer) < 2 or not isinstance(outer[-1][1], int) or outer[-1][1] < SHORTEST_ROW:
        return False
    if not all(isinstance(stmt, Let | Write) for stmt in body):
        return False
    last, rows = outer[-1][0], {var for var, _ in outer[:-1]}
    found = (load.index[0].free_symbols for root in expressions(body) for load in ex.loads(root) if not load.bind)
    return any(last not in variables and variables & rows for variables in found)


UNKNOWN_SIZE = 1024
"""What a size that is not known counts as."""

LEAST_ACROSS = 1 / 8
"""Share of bytes that run along another axis from which tiles pay: what a few channels or a row hold does not count."""


def _strips(outer: tuple[Axis, ...], body: tuple[Stmt, ...]) -> Shape | None:
    """The form of a nest over strips (``schedule.strips``); None for any other nest."""
    serial = [n for n, s in enumerate(body) if isinstance(s, Nest) and set(s.roles) == {Role.SERIAL}]
    if len(serial) != 1 or serial[0] != len(body) - 2:
        return None
    *memory, start, rows, end = body
    assert isinstance(rows, Nest)
    ranges = [stmt for stmt in rows.body if isinstance(stmt, Nest | Fold)]
    if not ranges or not isinstance(start, Nest) or not isinstance(end, Nest):
        return None
    inner = ranges[0].axes
    first, last = _over(start, inner), _over(end, inner)
    assert isinstance(first, Nest)
    assert isinstance(last, Nest)
    strips = Strips(
        rows.axes,
        tuple(s for s in memory if isinstance(s, Scratch)),
        tuple(s for s in first.body if isinstance(s, Write)),
        tuple(s for s in last.body if isinstance(s, Write)),
    )
    made = tuple(_over(stmt, inner) for stmt in rows.body)
    folds = any(isinstance(stmt, Fold) for stmt in made)
    scratch = any(isinstance(stmt, Scratch) for stmt in made)
    return Shape(outer, inner, made, False, scratch, tiled=not folds, strips=strips)


SHORTEST_TILED = 8
"""Fewest positions along both axes of a tile: 8 f32 are one 32-byte sector."""


def _tile(outer: tuple[Axis, ...], body: tuple[Stmt, ...]) -> tuple[tuple[Axis, ...], Axis] | None:
    """The axes of a flat body cut in two for tiles, if some accesses run along another axis than the last one does.

    The first part ends in the axis along which most bytes are accessed besides the last, which is the second part.
    """
    if len(outer) < 2 or not isinstance(outer[-1][1], int) or outer[-1][1] < SHORTEST_TILED:
        return None
    along: dict[int, int] = {}
    for address, itemsize in _accesses(body):
        runs = [n for n, (var, _) in enumerate(outer) if _unit_step(address, var)]
        if runs:
            touched = (size for var, size in outer if var in address.free_symbols)
            elements = math.prod(size if isinstance(size, int) else UNKNOWN_SIZE for size in touched)
            along[runs[-1]] = along.get(runs[-1], 0) + itemsize * elements
    last = along.get(len(outer) - 1, 0)
    others = {n: nbytes for n, nbytes in along.items() if n != len(outer) - 1 and nbytes >= LEAST_ACROSS * last}
    if not others or not last:
        return None
    axis = max(others, key=lambda n: (others[n], n))
    size = outer[axis][1]
    if isinstance(size, int) and size < SHORTEST_TILED:
        return None
    return (*(a for n, a in enumerate(outer[:-1]) if n != axis), outer[axis]), outer[-1]


def _accesses(body: tuple[Stmt, ...]) -> list[tuple[sympy.Expr, int]]:
    """Addresses that are read and written, each with the bytes of an element; data-dependent ones are left out."""
    found: dict[tuple[str, sympy.Expr], int] = {}
    for root in expressions(body):
        for load in ex.loads(root):
            if len(load.index) == 1 and not load.bind:
                found[load.buffer, load.index[0]] = load.dtype.itemsize
    for stmt in statements(body):
        if isinstance(stmt, Write) and not stmt.bind:
            found[stmt.buffer, stmt.address] = stmt.expr.dtype.itemsize
    return [(address, itemsize) for (_, address), itemsize in found.items()]


def _unit_step(address: sympy.Expr, var: sympy.Symbol) -> bool:
    """Whether the address grows by one with ``var``."""
    return bool(sympy.expand(address.xreplace({var: var + 1}) - address) == 1)


def is_batch(kernel: Kernel) -> bool:
    """Whether the body is several nests that are independent of each other (``schedule.batch``)."""
    return len(kernel.body) > 1 and all(isinstance(stmt, Nest) for stmt in kernel.body)


def members_of(kernel: Kernel) -> list[Kernel]:
    """The nests of a batch as kernels of their own."""
    made = []
    for nest in kernel.body:
        written = {s.buffer for s in statements((nest,)) if isinstance(s, Write)}
        outs = tuple(out for out in kernel.outs if out.name in written)
        made.append(replace(kernel, outs=outs, body=(nest,), targets=(None,) * len(outs), inplace=()))
    return made


def _over(stmt: Stmt, axes: tuple[Axis, ...]) -> Stmt:
    """An inner range over the variables of ``axes``, so that equal values in different ranges are equal expressions."""
    if not isinstance(stmt, Nest | Fold) or stmt.axes == axes:
        return stmt
    names = {old: new for (old, _), (new, _) in zip(stmt.axes, axes, strict=True)}
    if isinstance(stmt, Nest):
        return replace(stmt, axes=axes, body=tuple(_renamed(s, names) for s in stmt.body))
    return replace(
        stmt,
        axes=axes,
        accumulators=tuple(a.map(lambda e: ex.substitute(e, names)) for a in stmt.accumulators),
        lets=tuple(_renamed(s, names) for s in stmt.lets),
        writes=tuple(_renamed(s, names) for s in stmt.writes),
    )


S = TypeVar("S", bound=Stmt)


def _renamed(stmt: S, names: Mapping[sympy.Symbol, sympy.Expr]) -> S:
    """A let or a write over other loop variables."""
    if isinstance(stmt, Let):
        return replace(stmt, expr=ex.substitute(stmt.expr, names))
    if isinstance(stmt, Write):
        return replace(
            stmt,
            address=stmt.address.xreplace(names),
            expr=ex.substitute(stmt.expr, names),
            bind=tuple(ex.substitute(b, names) for b in stmt.bind),
        )
    return stmt


BATCH_WARPS = 4
"""Warps of every program of a batch, whichever member it belongs to."""


def choose_launch(kernel: Kernel, hints: Mapping[sympy.Symbol, int], warps: int | None = None) -> Launch:
    """The cut of ``kernel`` at the size hints. Members of a batch get the batch's ``warps``; a batch itself has no cut.

    Raises:
        CompilerBug: a kernel form that fusion does not emit.
    """
    if is_batch(kernel):
        return Launch(0, 0, False, BATCH_WARPS)
    cut = _cut(shape_of(kernel), hints)
    return cut if warps is None else replace(cut, num_warps=warps)


def _cut(shape: Shape, hints: Mapping[sympy.Symbol, int]) -> Launch:
    outer = _extent(shape.outer, hints)
    if shape.inner is None:
        limit, block, warps = next(rule for rule in FLAT if outer <= rule[0])
        if limit == FLAT[-1][0] and sum(map(ex.flops, expressions(shape.body))) >= HEAVY_FLOPS:
            block, warps = HEAVY
        block = min(block, max(power_of_two(outer), 32))
        return Launch(block, 0, False, max(1, min(warps, block // 64)))
    if shape.strips is not None:
        return _strip_cut(shape, shape.strips)
    if shape.row_blocks:
        return _row_block_cut(shape, outer)
    if shape.tiled:
        return Launch(*TILE, False, TILE_WARPS)
    if shape.product is not None:
        return product_launches(shape.product, shape.inner, hints)[0]
    if shape.tiles is not None:
        width = min(COLUMN_WIDTH[-1], power_of_two(outer)) if shape.column else 1
        length = shape.tiles.length
        return Launch(width, length, True, _warps(width * length, 512))
    inner = _extent(shape.inner, hints)
    static = all(isinstance(size, int) for _, size in shape.inner)
    whole = power_of_two(inner)
    if shape.column:
        width = next((w for w in COLUMN_WIDTH if outer >= w * PROGRAMS), COLUMN_WIDTH[-1])
        width = min(width, power_of_two(outer))
        rows = min(whole, max(COLUMN_TILE // width, 1))
        return Launch(width, rows, static and rows == whole, _warps(width * rows, 512))
    if static and whole <= (SCRATCH_PERSISTENT if shape.scratch else PERSISTENT):
        block = max(1, min(power_of_two(outer), ROW_TILE // whole))
        while block > 1 and outer < block * PROGRAMS:
            block //= 2
        return Launch(block, whole, True, _warps(block * whole, 512))
    if shape.scratch:
        raise CompilerBug(f"a GPU kernel has scratch memory for rows of {inner} elements")
    if loops_nest(shape):
        whole = power_of_two(_extent(shape.inner[-1:], hints))
    return Launch(1, min(LOOP_BLOCK, whole), False, 8)


PRODUCT_TILES = (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 5), (64, 32, 64, 4, 5),
    (32, 32, 64, 2, 5), (16, 64, 64, 2, 5),
)  # fmt: skip
"""(rows, columns, step of 2-byte elements, warps, stages) of a program of a matrix product, larger ones first: a tile
reads rows + columns of each for rows times columns products."""

PRODUCT_SHARED_BYTES = 160 * 1024
"""Most bytes of operands in flight: what a program may have in shared memory on every GPU with bf16 matrix units."""

LARGEST_WIDE_TILE = 128 * 128
"""Most elements of a tile of 4-byte operands: 128 x 256 spill registers on an H100."""

LEAST_TILE = 16
"""Shortest side of a tile that matrix units take."""


def product_launches(
    product_axes: ProductAxes, inner: tuple[Axis, ...], hints: Mapping[sympy.Symbol, int]
) -> tuple[Launch, ...]:
    """Cuts of a matrix product worth a try, the most promising first: tiles no larger than the result, ranked by the
    time of the slowest multiprocessor, in bytes of operands that it reads."""
    batch, rows, columns = (_extent(a, hints) for a in (product_axes.batch, product_axes.rows, product_axes.columns))
    summed, itemsize = _extent(inner, hints), product_axes.dtype.itemsize
    found: dict[Launch, float] = {}
    for block, width, step, warps, stages in PRODUCT_TILES:
        if itemsize > 2 and block * width > LARGEST_WIDE_TILE:
            continue
        block, width = (max(LEAST_TILE, min(n, power_of_two(m))) for n, m in ((block, rows), (width, columns)))
        step = max(LEAST_TILE, min(step * 2 // itemsize, power_of_two(summed)))
        while stages > 2 and stages * step * (block + width) * itemsize > PRODUCT_SHARED_BYTES:
            stages -= 1
        programs = batch * -(-rows // block) * -(-columns // width)
        waves = -(-programs // (PROGRAMS // 2))
        found.setdefault(Launch(block, width, False, warps, stages, step), float(waves * (block + width + 64)))
    return tuple(sorted(found, key=lambda launch: found[launch]))


LEAST_NESTED = 512
"""Neighbours from which rows of several axes are taken in nested loops: they fill blocks, and nothing is divided."""


def loops_nest(shape: Shape) -> bool:
    """Whether a looped row of several axes has a loop for the last one inside a loop for the others."""
    if shape.inner is None or len(shape.inner) < 2 or shape.column or shape.tiled or shape.strips is not None:
        return False
    if shape.product is not None:
        return False
    last = shape.inner[-1][1]
    return isinstance(last, int) and last >= LEAST_NESTED


ROW_BLOCKS = (1024, 512, 256)
"""Elements of a row that a program takes; the first that wastes fewest lanes."""


def _row_block_cut(shape: Shape, rows: int) -> Launch:
    """Blocks of rows, 16 elements a thread."""
    columns = _extent(shape.inner or (), {})
    inner = min(ROW_BLOCKS, key=lambda n: (round(-(-columns // n) * n / columns, 1), ROW_BLOCKS.index(n)))
    block = max(1, min(ROW_TILE // inner, power_of_two(rows)))
    return Launch(block, inner, False, _warps(block * inner, 512))


def _strip_cut(shape: Shape, strips: Strips) -> Launch:
    """Whole rows where they are reduced, else blocks of columns; rows at once and warps as ``STRIP_TILE`` says."""
    columns, rows = _extent(shape.inner or (), {}), _extent(strips.rows, {})
    whole = power_of_two(columns)
    inner = min(whole, STRIP_COLUMNS) if shape.tiled else whole
    warps = max(1, min(max(STRIP_TILE, inner) // STRIP_EACH, inner // STRIP_ROW_EACH, 16))
    block = max(1, min(warps * STRIP_EACH // inner, rows & -rows))
    return Launch(block, inner, True, warps, STRIP_STAGES)


def _warps(elements: int, each: int) -> int:
    """Warps for so many elements, ``each`` a warp."""
    return max(1, min(16, power_of_two(elements) // each))


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _extent(axes: tuple[Axis, ...], hints: Mapping[sympy.Symbol, int]) -> int:
    total: Size = product(tuple(size for _, size in axes))
    return hint(total, dict(hints))
