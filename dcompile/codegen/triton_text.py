"""Triton text of types, literals and integer expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy

from dcompile.errors import CompilerBug
from dcompile.ir.index import FloorDiv, Mod, as_expr
from dcompile.ir.types import DType, Size

INT32_REACH = 2**31 - 2**17
"""Index arithmetic whose every intermediate value stays below this is done in 32 bits. The distance to 2**31 is the
room for positions of the last, partly masked block (blocks have at most 2**16 elements)."""

POINTER = {
    DType.F64: "*fp64", DType.F32: "*fp32", DType.F16: "*fp16", DType.BF16: "*bf16", DType.I64: "*i64",
    DType.I32: "*i32", DType.I16: "*i16", DType.I8: "*i8", DType.U8: "*u8", DType.BOOL: "*i1",
}  # fmt: skip
"""Pointer types of kernel signatures."""

_NAMES = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.I64: "int64",
    DType.I32: "int32", DType.I16: "int16", DType.I8: "int8", DType.U8: "uint8", DType.BOOL: "int1",
}  # fmt: skip


def type_text(dtype: DType) -> str:
    """``tl.float32``.

    Raises:
        CompilerBug: complex elements, which kernels do not have.
    """
    if dtype not in _NAMES:
        raise CompilerBug(f"kernels do not compute on {dtype.value}")
    return f"tl.{_NAMES[dtype]}"


def register_text(dtype: DType) -> str:
    """The type a value of ``dtype`` has between its load and its store: 16-bit floats are kept in f32."""
    return type_text(dtype.compute)


def literal(value: bool | int | float, dtype: DType) -> str:
    """A typed scalar."""
    register = register_text(dtype)
    if dtype is DType.BOOL:
        return f"tl.full([], {int(bool(value))}, tl.int1)"
    if dtype.is_int:
        return f"tl.full([], {_wrapped(int(value), dtype)}, {register})"
    number = float(value)
    if number == 0.0 and math.copysign(1.0, number) < 0:  # zero literals lose their sign, bits do not
        bits = 64 if dtype is DType.F64 else 32
        return f"tl.full([], {-(2 ** (bits - 1))}, tl.int{bits}).to({register}, bitcast=True)"
    text = repr(number) if math.isfinite(number) else f'float("{number}")'
    return rounded(f"tl.full([], {text}, {register})", dtype)


def _wrapped(value: int, dtype: DType) -> int:
    bits = dtype.itemsize * 8
    value %= 1 << bits
    return value - (1 << bits) if dtype is not DType.U8 and value >= 1 << (bits - 1) else value


def rounded(text: str, dtype: DType) -> str:
    """The register value ``text`` rounded to ``dtype``; nothing to do unless registers are wider."""
    if not dtype.is_low_precision:
        return text
    return f"({text}).to({type_text(dtype)}).to(tl.float32)"


def neutral(kind: str, dtype: DType) -> str:
    """What a reduction starts from, as a Python literal."""
    if kind in ("sum", "any"):
        return "0"
    if kind == "prod":
        return "1"
    highest = kind in ("min", "argmin")
    if dtype.is_float:
        return 'float("inf")' if highest else 'float("-inf")'
    if dtype is DType.BOOL:
        return str(int(highest))
    bits = dtype.itemsize * 8
    low, high = (0, 2**bits - 1) if dtype is DType.U8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return str(high if highest else low)


def reach(expr: sympy.Expr, extents: Mapping[sympy.Symbol, Size]) -> int | None:
    """A bound of the magnitude of ``expr`` and of every intermediate value, None when there is no constant one."""
    if expr.is_Integer:
        return abs(int(expr))
    if expr.is_Symbol:
        extent = extents.get(expr)
        return max(extent, 1) if isinstance(extent, int) else None
    found = [reach(arg, extents) for arg in expr.args]
    parts = [part for part in found if part is not None]
    if len(parts) != len(found):
        return None
    if isinstance(expr, sympy.Add):
        return sum(parts)
    if isinstance(expr, sympy.Mul):
        return math.prod(max(part, 1) for part in parts)
    if isinstance(expr, sympy.Pow):
        return int(max(parts[0], 1) ** min(parts[1], 64))
    return max(parts)


def index_text(expr: sympy.Expr, name: Callable[[sympy.Symbol], str]) -> str:
    """``expr`` as integer arithmetic; divisions whose operands may be negative go through helpers that round down.

    Raises:
        CompilerBug: a form that no size or address takes.
    """
    if expr.is_Integer:
        return str(int(expr))
    if expr.is_Symbol:
        return name(expr)
    parts = [index_text(arg, name) for arg in sorted(expr.args, key=_constants_last)]
    if isinstance(expr, sympy.Add):
        return f"({' + '.join(parts)})"
    if isinstance(expr, sympy.Mul):
        return f"({' * '.join(parts)})"
    if isinstance(expr, FloorDiv | Mod):
        left, right = (index_text(arg, name) for arg in expr.args)
        if all(arg.is_nonnegative for arg in expr.args):
            return f"({left} {'//' if isinstance(expr, FloorDiv) else '%'} {right})"
        return f"{'index_div' if isinstance(expr, FloorDiv) else 'index_mod'}({left}, {right})"
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and int(expr.exp) > 0:
        return "(" + " * ".join([index_text(expr.base, name)] * int(expr.exp)) + ")"
    if isinstance(expr, sympy.Max | sympy.Min):
        helper = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        text = parts[0]
        for part in parts[1:]:
            text = f"{helper}({text}, {part})"
        return text
    raise CompilerBug(f"an address holds {expr}, which has no Triton form")


def _constants_last(expr: sympy.Expr) -> tuple[bool, str]:
    return expr.is_Integer, str(expr)


def size_python(size: Size, names: Mapping[sympy.Symbol, str]) -> str:
    """A size as Python text over the variables ``names``, for launch grids."""

    def visit(expr: sympy.Expr) -> str:
        if isinstance(expr, FloorDiv | Mod):
            left, right = (visit(arg) for arg in expr.args)
            return f"({left} {'//' if isinstance(expr, FloorDiv) else '%'} {right})"
        if isinstance(expr, sympy.Max | sympy.Min):
            return f"{'max' if isinstance(expr, sympy.Max) else 'min'}({', '.join(visit(arg) for arg in expr.args)})"
        if isinstance(expr, sympy.Add | sympy.Mul):
            return f"({(' + ' if isinstance(expr, sympy.Add) else ' * ').join(visit(arg) for arg in expr.args)})"
        return index_text(expr, lambda symbol: names[symbol])

    return visit(as_expr(size))
