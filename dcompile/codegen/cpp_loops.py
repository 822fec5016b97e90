"""Facts about loops that the C++ printers share: extents, volumes, blocks of a sum, conflicts between iterations."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from dcompile.codegen.cpp_fold import BLOCK, SERIAL_BLOCK
from dcompile.ir.index import as_expr, stride_of
from dcompile.ir.kernel import Fold, Nest, Role, ScanLoop, Stmt, Write
from dcompile.ir.nodes import Axis
from dcompile.ir.types import Size


def for_text(var: str, begin: str, end: str) -> str:
    return f"for (int64_t {var} = {begin}; {var} < {end}; {var}++)"


def error_clause(lines: Sequence[str]) -> str:
    """The clause that joins the error bits of all threads and lanes of a loop that may set them."""
    return " reduction(|:error)" if any("error)" in text for text in lines) else ""


def at_least_one(extent: Size) -> bool:
    """Whether a loop surely runs."""
    return isinstance(extent, int) and extent > 0


def volume(axes: tuple[Axis, ...], body: Sequence[Stmt]) -> Size:
    """Iterations of a nest with the largest of the loops inside it."""
    total: Size = 1
    for _, extent in axes:
        total = total * extent
    loops = [s for s in body if isinstance(s, Nest | Fold | ScanLoop)]
    inside = [volume(s.axes, s.body if isinstance(s, Nest) else ()) for s in loops]
    static = [size for size in inside if isinstance(size, int)]
    dynamic = [size for size in inside if not isinstance(size, int)]
    return total * (dynamic[0] if dynamic else max(static, default=1))


def row_major(axes: tuple[Axis, ...]) -> sympy.Expr:
    """The position inside ``axes``, counted row by row."""
    position: sympy.Expr = sympy.Integer(0)
    for var, extent in axes:
        position = position * as_expr(extent) + var
    return position


def injective(address: sympy.Expr, axes: Sequence[Axis], variables: Sequence[sympy.Symbol]) -> bool:
    """Whether two iterations of ``axes`` that differ in one of ``variables`` surely have different addresses.

    True when the strides, sorted, each step over everything that the smaller ones reach.
    """
    steps: list[tuple[int, int, sympy.Symbol]] = []
    for var, extent in axes:
        step = stride_of(address, var)
        if step is None or not step.is_Integer or not isinstance(extent, int):
            return False
        if step != 0 and extent > 1:
            steps.append((abs(int(step)), extent, var))
        elif var in variables and extent > 1:
            return False
    reach = 0
    for step, extent, _ in sorted(steps, key=lambda item: item[0]):
        if step <= reach:
            return False
        reach += step * (extent - 1)
    return True


def conflicts(stmt: Write, var: sympy.Symbol, axes: Sequence[Axis]) -> bool:
    """Whether iterations of ``var``, one of ``axes``, may add to the same address."""
    return stmt.mode == "add" and (bool(stmt.bind) or not injective(stmt.address, axes, [var]))


def block_size(roles: Sequence[Role]) -> int:
    """Elements of one block of a sum over axes with these roles."""
    return BLOCK if roles and roles[-1] is Role.SIMD else SERIAL_BLOCK


def splits(axes: tuple[Axis, ...], block: int) -> bool:
    """Whether a sum over ``axes`` needs more than one block of ``block`` elements."""
    total: Size = 1
    for _, extent in axes:
        total = total * extent
    return not (isinstance(total, int) and total <= block)


def block_level(axes: tuple[Axis, ...], block: int) -> int:
    """The outermost axis inside which everything fits one block."""
    level, inside = len(axes) - 1, 1
    while level > 0 and isinstance(extent := axes[level][1], int) and inside * extent <= block:
        inside *= max(extent, 1)
        level -= 1
    return level


def block_step(axes: tuple[Axis, ...], level: int, block: int) -> int:
    """Iterations of axis ``level`` in one block."""
    inside = 1
    for _, extent in axes[level + 1 :]:
        inside *= max(extent, 1) if isinstance(extent, int) else block
    return max(block // inside, 1)
