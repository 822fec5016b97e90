"""Other ways to cut a kernel into programs, the promising ones first, to be chosen between by measurement.

They are ranked by a roofline of the memory system: lanes that blocks fill for nothing, multiprocessors idle in the last
wave of programs, and elements a thread has in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import sympy

from dcompile.codegen.triton_launch import Launch, Shape, is_batch, power_of_two, product_launches, shape_of
from dcompile.ir.graph import hint
from dcompile.ir.index import product
from dcompile.ir.kernel import Kernel, ScanLoop
from dcompile.ir.nodes import Axis

MOST_VARIANTS = 4
"""Cuts tried beside the default: each takes about a second of one core to compile."""

MULTIPROCESSORS, RESIDENT_WARPS, RESIDENT_PROGRAMS = 132, 64, 32
"""Of an H100 or H200: what one multiprocessor holds at most."""

BEST_EACH = 8
"""Elements of a thread whose loads hide the latency of memory: 16 bytes of a 16-bit type."""

LARGEST_TILE, MOST_EACH = 16384, 64
"""Positions of a program, and of a thread."""


def other_launches(kernel: Kernel, default: Launch, hints: Mapping[sympy.Symbol, int]) -> tuple[Launch, ...]:
    """At most ``MOST_VARIANTS`` cuts beside ``default``; none for batches and scans, which have one."""
    if is_batch(kernel):
        return ()
    shape = shape_of(kernel)
    if shape.product is not None:
        cuts = product_launches(shape.product, shape.inner or (), hints)
        return tuple(launch for launch in cuts if launch != default)[:MOST_VARIANTS]
    if any(isinstance(stmt, ScanLoop) for stmt in shape.body):
        return ()
    found = {launch for launch in _neighbours(shape, default, hints) if launch != default}
    return tuple(sorted(found, key=lambda launch: (_waste(shape, launch, hints), _order(launch)))[:MOST_VARIANTS])


def _neighbours(shape: Shape, default: Launch, hints: Mapping[sympy.Symbol, int]) -> list[Launch]:
    """Cuts of the same form: other warps, blocks and loads in flight."""
    found: list[Launch] = []
    fixed = shape.inner is not None and default.persistent and not (shape.tiled and shape.strips is not None)
    for block in _around(default.block):
        for inner in (default.inner,) if fixed or shape.inner is None else _around(default.inner):
            for warps in _around(default.num_warps):
                for stages in _stages(shape, default):
                    found.append(replace(default, block=block, inner=inner, num_warps=warps, stages=stages))
    return [launch for launch in found if _possible(shape, launch, hints)]


def _around(n: int) -> tuple[int, ...]:
    return tuple(sorted({max(n // 2, 1), n, n * 2}))


def _stages(shape: Shape, default: Launch) -> tuple[int, ...]:
    looped = shape.strips is not None or (shape.inner is not None and not default.persistent and not shape.tiled)
    return (1, 2, 3) if looped else (default.stages,)


def _possible(shape: Shape, launch: Launch, hints: Mapping[sympy.Symbol, int]) -> bool:
    tile = launch.block * max(launch.inner, 1)
    threads = 32 * launch.num_warps
    if launch.num_warps > 32 or tile > LARGEST_TILE * 2 or tile < threads or tile // threads > MOST_EACH:
        return False
    if shape.strips is not None and _extent(shape.strips.rows, hints) % launch.block:
        return False
    if shape.inner is not None and launch.inner > power_of_two(_extent(shape.inner, hints)):
        return False
    return launch.block <= power_of_two(_extent(shape.outer if shape.strips is None else shape.strips.rows, hints))


def _waste(shape: Shape, launch: Launch, hints: Mapping[sympy.Symbol, int]) -> float:
    """How many times the least time of the memory system a cut is expected to take, in steps too coarse for noise."""
    outer = _extent(shape.outer, hints)
    programs, idle = (float(outer), 1.0) if shape.strips is not None else _blocks(outer, launch.block)
    if shape.inner is not None:
        blocks, waste = _blocks(_extent(shape.inner, hints), launch.inner)
        idle *= waste
        programs *= blocks if shape.tiled else 1.0
    resident = MULTIPROCESSORS * max(min(RESIDENT_WARPS // launch.num_warps, RESIDENT_PROGRAMS) // 2, 1)
    waves = programs / resident
    quantised = math.ceil(waves) / waves if waves < 8 else 1.0
    each = launch.block * max(launch.inner, 1) / (32 * launch.num_warps)
    return round(idle * min(quantised, 4.0) * (1 + 0.1 * abs(math.log2(each / BEST_EACH))), 1)


def _order(launch: Launch) -> tuple[int, ...]:
    return (-launch.stages, launch.block, launch.inner, launch.num_warps)


def _blocks(extent: int, block: int) -> tuple[float, float]:
    """Number of blocks, and their positions by those that exist."""
    count = max(-(-extent // block), 1)
    return float(count), count * block / max(extent, 1)


def _extent(axes: tuple[Axis, ...], hints: Mapping[sympy.Symbol, int]) -> int:
    return hint(product(tuple(size for _, size in axes)), dict(hints))
