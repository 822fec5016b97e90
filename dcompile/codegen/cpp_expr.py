"""C++ text of one scalar operation, given the text of its operands."""

from __future__ import annotations

from dcompile.codegen.cpp_types import register_type
from dcompile.errors import CompilerBug
from dcompile.ir.types import DType

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "and": "&",
    "or": "|",
    "xor": "^",
}
_BOOL_INFIX = {"add": "|", "mul": "&", "maximum": "|", "minimum": "&", "sub": "^"}
_EXACT = frozenset(("neg", "abs", "sign", "maximum", "minimum", "fmax", "fmin", "floor", "ceil", "trunc", "round"))
"""Ops whose result on a 16-bit float is itself one, so that no rounding follows."""

REPORTING = frozenset({"wrap_index", "floordiv", "truncdiv", "mod", "fmod"})
"""Ops that may set the kernel's error bits (the divisions only on integers)."""


def reports(name: str, dtype: DType) -> bool:
    """Whether the op takes the kernel's error variable as its last argument."""
    return name == "wrap_index" or (name in REPORTING and dtype.is_int)


def op_text(name: str, args: tuple[str, ...], operand: DType, result: DType) -> str:
    """The op as a C++ expression.

    Args:
        args: operand texts, each an identifier or a literal.
        operand: dtype of the last operand (of the value operands for ``where``).
        result: dtype of the op.

    Raises:
        CompilerBug: a combination the language has no meaning for.
    """
    if name == "to":
        return _convert(args[0], operand, result)
    if name == "bitcast":
        return _bitcast(args[0], operand, result)
    if name == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    text = _plain(name, args, operand)
    if operand.is_low_precision and result is operand and name not in _EXACT:
        return f"dc::round_{operand.value}({text})"
    if name in _INFIX and result.is_int and result.itemsize < 4:
        return f"({register_type(result)})({text})"
    return text


def _plain(name: str, args: tuple[str, ...], operand: DType) -> str:
    if operand is DType.BOOL:
        if name in _BOOL_INFIX:
            return f"(bool)({args[0]} {_BOOL_INFIX[name]} {args[1]})"
        if name == "not":
            return f"!{args[0]}"
    if name in _INFIX:
        text = f"{args[0]} {_INFIX[name]} {args[1]}"
        return f"(bool)({text})" if operand is DType.BOOL else text
    if name == "div":
        if not operand.is_float:
            raise CompilerBug(f"true division of {operand.value}")
        return f"{args[0]} / {args[1]}"
    if name == "not":
        return f"({register_type(operand)})(~{args[0]})"
    if name == "neg":
        return f"({register_type(operand)})(-{args[0]})"
    if name == "rand" or name == "randn":
        return f"dc::{name}({args[0]}, {args[1]})"
    trailing = ("error",) if reports(name, operand) else ()
    text = f"dc::{name}_({', '.join((*args, *trailing))})"
    narrow = operand.is_int and operand.itemsize < 4
    return f"({register_type(operand)})({text})" if narrow and name not in ("isnan", "isinf") else text


def _convert(text: str, source: DType, result: DType) -> str:
    if result is DType.BOOL:
        return f"{text} != 0"
    if source is DType.BOOL and result.is_float:  # a choice: GCC 12 gives up vectorising a loop at the conversion
        suffix = "" if result is DType.F64 else "f"
        return f"({text} ? 1.0{suffix} : 0.0{suffix})"
    if result.is_low_precision:
        return f"(float)({text})" if source is result else f"dc::round_{result.value}((float)({text}))"
    if source.is_float and result is DType.U8:  # through a signed type, so that -1.0 wraps to 255
        return f"(uint8_t)(int64_t)({text})"
    if source.is_float and result.is_int and result.itemsize < 4:
        return f"({register_type(result)})(int32_t)({text})"
    return f"({register_type(result)})({text})"


def _bitcast(text: str, source: DType, result: DType) -> str:
    if source.is_low_precision:
        text = f"dc::{source.value}_bits({text})"
    if result.is_low_precision:
        return f"dc::from_{result.value}((uint16_t)({text}))"
    return f"dc::bitcast<{register_type(result)}>({text})"


def load_text(element: str, dtype: DType) -> str:
    """The register value of the memory element ``element``."""
    if dtype.is_low_precision:
        return f"dc::from_{dtype.value}({element})"
    return f"{element} != 0" if dtype is DType.BOOL else element


def store_text(value: str, dtype: DType) -> str:
    """The memory form of the register value ``value``."""
    if dtype.is_low_precision:
        return f"dc::{dtype.value}_bits({value})"
    return f"(uint8_t)({value})" if dtype is DType.BOOL else value
