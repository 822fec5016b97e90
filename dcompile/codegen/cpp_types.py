"""C++ spellings of element types, literals and integer index expressions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping

import sympy
import torch

from dcompile.errors import CompilerBug
from dcompile.ir.index import FloorDiv, Mod
from dcompile.ir.types import DType, Size

STORAGE = {
    DType.F64: "double",
    DType.F32: "float",
    DType.F16: "uint16_t",
    DType.BF16: "uint16_t",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.I16: "int16_t",
    DType.I8: "int8_t",
    DType.U8: "uint8_t",
    DType.BOOL: "uint8_t",
}
"""C++ type of an element in memory. 16-bit floats are kept as their bits."""

REGISTER = STORAGE | {DType.F16: "float", DType.BF16: "float", DType.BOOL: "bool"}
"""C++ type of a value in a register. A 16-bit float is a ``float`` that holds an exactly representable number."""

LARGEST_INT32 = 2**31 - 1


def storage_type(dtype: DType) -> str:
    """The C++ type of an element in memory.

    Raises:
        CompilerBug: complex numbers, which have no kernels.
    """
    if dtype not in STORAGE:
        raise CompilerBug(f"C++ kernels have no {dtype.value} elements")
    return STORAGE[dtype]


def register_type(dtype: DType) -> str:
    """The C++ type of a scalar value.

    Raises:
        CompilerBug: complex numbers, which have no kernels.
    """
    if dtype not in REGISTER:
        raise CompilerBug(f"C++ kernels have no {dtype.value} scalars")
    return REGISTER[dtype]


def literal(value: bool | int | float, dtype: DType) -> str:
    """``value`` as a C++ literal of ``dtype``'s register type."""
    if dtype is DType.BOOL:
        return "true" if value else "false"
    if dtype.is_int:
        return _int_literal(int(value), dtype)
    return _float_literal(float(value), dtype)


def _int_literal(value: int, dtype: DType) -> str:
    bits = dtype.itemsize * 8
    value %= 1 << bits
    if dtype is not DType.U8 and value >= 1 << (bits - 1):
        value -= 1 << bits
    if dtype is DType.I64:
        return f"(-INT64_C({2**63 - 1}) - 1)" if value == -(2**63) else f"INT64_C({value})"
    if value == -(2**31):
        return f"(-{LARGEST_INT32} - 1)"
    return str(value) if dtype is DType.I32 else f"({STORAGE[dtype]})({value})"


def _float_literal(value: float, dtype: DType) -> str:
    single = dtype is not DType.F64
    suffix = "f" if single else ""
    if single and math.isfinite(value):
        value = _rounded(value, dtype)
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    text = f"{value:.9g}" if single else repr(value)
    return text + ("" if any(mark in text for mark in ".e") else ".0") + suffix


def _rounded(value: float, dtype: DType) -> float:
    """``value`` as the nearest number of a float type narrower than double."""
    if dtype is DType.F32:
        try:
            return float(struct.unpack("f", struct.pack("f", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)
    return float(torch.tensor(value, dtype=dtype.torch).item())


Bounds = tuple[int, int]
"""Inclusive lower and upper bound."""


def bounds(expr: sympy.Expr, extents: Mapping[sympy.Symbol, Size]) -> Bounds | None:
    """Constant bounds of ``expr`` when every variable it uses has a static extent, else None."""
    if expr.is_Integer:
        return int(expr), int(expr)
    if expr.is_Symbol:
        extent = extents.get(expr)
        return (0, max(extent - 1, 0)) if isinstance(extent, int) else None
    parts = [bounds(arg, extents) for arg in expr.args]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    if isinstance(expr, sympy.Add):
        return sum(low for low, _ in known), sum(high for _, high in known)
    if isinstance(expr, sympy.Mul):
        low, high = 1, 1
        for part in known:
            corners = [a * b for a in (low, high) for b in part]
            low, high = min(corners), max(corners)
        return low, high
    if isinstance(expr, FloorDiv) and known[1][0] > 0:
        return known[0][0] // (known[1][0] if known[0][0] < 0 else known[1][1]), known[0][1] // known[1][0]
    if isinstance(expr, Mod) and known[1][0] > 0:
        inside = known[0][0] >= 0 and known[0][1] < known[1][0]
        return known[0] if inside else (0, known[1][1] - 1)
    return None


def index_text(
    expr: sympy.Expr,
    name: Callable[[sympy.Symbol], str],
    extents: Mapping[sympy.Symbol, Size],
) -> str:
    """``expr`` as int64_t C++ arithmetic.

    A division of operands that provably fit 31 bits is done in 32-bit unsigned arithmetic, which vectorises; one whose
    dividend may be negative goes through a helper that rounds down.

    Raises:
        CompilerBug: a form that no size or address takes.
    """

    def visit(node: sympy.Expr, tight: bool) -> str:
        if node.is_Integer:
            return str(int(node)) if abs(int(node)) <= LARGEST_INT32 else f"{int(node)}LL"
        if node.is_Symbol:
            return name(node)
        if isinstance(node, sympy.Add):
            text = " + ".join(visit(arg, False) for arg in _ordered(node)).replace("+ -", "- ")
            return f"({text})" if tight else text
        if isinstance(node, sympy.Mul):
            text = " * ".join(visit(arg, True) for arg in _ordered(node))
            return f"({text})" if tight else text  # x / (a * b)
        if isinstance(node, FloorDiv | Mod):
            return divide(node)
        if isinstance(node, sympy.Pow) and node.exp.is_Integer and int(node.exp) > 0:
            return "(" + " * ".join([visit(node.base, True)] * int(node.exp)) + ")"
        if isinstance(node, sympy.Max | sympy.Min):
            text = visit(node.args[0], False)
            for arg in node.args[1:]:
                text = f"dc::{'max' if isinstance(node, sympy.Max) else 'min'}_index({text}, {visit(arg, False)})"
            return text
        raise CompilerBug(f"an address holds {node}, which has no C++ form")

    def divide(node: sympy.Expr) -> str:
        value, divisor = node.args
        sign = "/" if isinstance(node, FloorDiv) else "%"
        reach = bounds(value, extents)
        if divisor.is_Integer and int(divisor) > 0 and reach and reach[0] >= 0 and reach[1] <= LARGEST_INT32:
            return f"(int64_t)((uint32_t)({visit(value, False)}) {sign} {int(divisor)}u)"
        positive = (reach is not None and reach[0] >= 0) or value.is_nonnegative
        if positive and divisor.is_nonnegative:
            return f"({visit(value, True)} {sign} {visit(divisor, True)})"
        helper = "floor_div_index" if isinstance(node, FloorDiv) else "floor_mod_index"
        return f"dc::{helper}({visit(value, False)}, {visit(divisor, False)})"

    return visit(expr, False)


def _ordered(node: sympy.Expr) -> list[sympy.Expr]:
    """Operands of a sum or product in a fixed order that puts constants last."""
    return sorted(node.args, key=lambda arg: (arg.is_Integer, str(arg)))
