"""Triton text of one scalar operation, given the text of its operands. 16-bit floats arrive in f32 registers."""

from __future__ import annotations

from dcompile.codegen.triton_text import register_text, rounded, type_text
from dcompile.errors import CompilerBug
from dcompile.ir.types import DType

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_BOOL_INFIX = {"add": "|", "mul": "&", "maximum": "|", "minimum": "&", "fmax": "|", "fmin": "&", "sub": "^"}
_EXACT = frozenset(
    ("neg", "abs", "sign", "maximum", "minimum", "fmax", "fmin", "floor", "ceil", "trunc", "round", "where")
)
"""Ops whose result on a 16-bit float is itself one, so that no rounding follows."""

_LIBDEVICE = frozenset(
    ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
     "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "floor", "ceil", "trunc", "pow",
     "fmod")
)  # fmt: skip
"""Float ops that are libdevice functions of the same name: the accurate ones, not the hardware approximations."""

_FLOAT_HELPERS = {
    "maximum": "nan_max", "minimum": "nan_min", "fmax": "num_max", "fmin": "num_min", "mod": "float_mod",
    "round": "libdevice.rint",
}  # fmt: skip
_INT_HELPERS = {
    "maximum": "tl.maximum", "minimum": "tl.minimum", "fmax": "tl.maximum", "fmin": "tl.minimum",
    "floordiv": "int_floordiv", "truncdiv": "int_truncdiv", "mod": "int_mod", "fmod": "int_fmod", "pow": "int_pow",
}  # fmt: skip
INT_DIVISIONS = frozenset({"floordiv", "truncdiv", "mod", "fmod"})


def op_text(name: str, args: tuple[str, ...], operand: DType, result: DType) -> str:
    """The op as a Triton expression; ``wrap_index``, which reports, is the printer's.

    Args:
        args: operand texts, each an identifier or a call.
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
        return f"tl.where({', '.join(args)})"
    if name in ("rand", "randn"):
        return f"{name}({args[0]}, {args[1]})"
    if name in _COMPARE:
        return f"{args[0]} {_INFIX[name]} {args[1]}"
    if operand is DType.BOOL:
        return _bool(name, args)
    if operand.is_int:
        text = _int(name, args, operand)
        return text if result is DType.BOOL or operand.itemsize >= 4 else f"({text}).to({register_text(result)})"
    text = _float(name, args, operand.compute)
    return text if result is DType.BOOL or name in _EXACT else rounded(text, result)


def _bool(name: str, args: tuple[str, ...]) -> str:
    if name in _BOOL_INFIX:
        return f"{args[0]} {_BOOL_INFIX[name]} {args[1]}"
    if name in _INFIX:
        return f"{args[0]} {_INFIX[name]} {args[1]}"
    if name == "not":
        return f"{args[0]} == 0"
    if name in ("isnan", "isinf"):
        return f"{args[0]} != {args[0]}"
    if name in ("abs", "sign"):
        return args[0]
    raise CompilerBug(f"{name} of bool")


def _int(name: str, args: tuple[str, ...], dtype: DType) -> str:
    x = args[0]
    bits = dtype.itemsize * 8
    if name in _INFIX:
        return f"{x} {_INFIX[name]} {args[1]}"
    if name in _INT_HELPERS:
        return f"{_INT_HELPERS[name]}({x}, {args[1]})"
    if name in ("isnan", "isinf"):
        return f"{x} != {x}"
    if name in ("floor", "ceil", "trunc", "round"):
        return x
    if name == "not":
        return f"{x} ^ {255 if dtype is DType.U8 else -1}"
    if name == "neg":
        return f"({x} * 0) - {x}"
    if name == "abs":
        return f"tl.abs({x})"
    if name == "sign":
        return f"({x} > 0).to({type_text(dtype)}) - ({x} < 0).to({type_text(dtype)})"
    if name == "fma":
        return f"{x} * {args[1]} + {args[2]}"
    if name == "shl":
        return f"int_shl({x}, {args[1]}, {bits})"
    if name == "shr":
        return f"int_shr({x}, {args[1]}, {bits - (dtype is not DType.U8)})"
    raise CompilerBug(f"{name} of {dtype.value}")


def _float(name: str, args: tuple[str, ...], dtype: DType) -> str:
    x = args[0]
    if name in ("add", "sub", "mul"):
        return f"{x} {_INFIX[name]} {args[1]}"
    if name == "div":
        return divide(x, args[1], dtype)
    if name in _LIBDEVICE:
        return f"libdevice.{name}({', '.join(args)})"
    if name in _FLOAT_HELPERS:
        return f"{_FLOAT_HELPERS[name]}({', '.join(args)})"
    if name == "neg":
        return f"{x} * -1.0"  # 0 - x, which unary minus is, has the wrong sign at zero
    if name == "abs":
        return f"tl.abs({x})"
    if name == "sign":
        return f"({x} > 0).to({register_text(dtype)}) - ({x} < 0).to({register_text(dtype)})"
    if name == "reciprocal":
        return divide("1.0", x, dtype)
    if name == "fma":
        return f"{x} * {args[1]} + {args[2]}"
    if name == "sqrt":
        return _sqrt(x, dtype)
    if name == "rsqrt":
        return f"libdevice.rsqrt({x})"
    if name == "sigmoid":
        return f"1.0 / (1.0 + libdevice.exp({x} * -1.0))"  # at most 2 units in the last place off, as exp itself
    if name == "truncdiv":
        return f"libdevice.trunc({divide(x, args[1], dtype)})"
    if name == "floordiv":
        return f"float_floordiv({x}, {args[1]}, {divide(x, args[1], dtype)})"
    if name == "isnan":
        return f"{x} != {x}"
    if name == "isinf":
        return f'tl.abs({x}) == float("inf")'
    raise CompilerBug(f"{name} of {dtype.value}")


def divide(a: str, b: str, dtype: DType) -> str:
    """True division rounded to nearest; ``a`` may be a Python number."""
    if dtype is DType.F64:
        return f"({a} / {b})"
    return f"tl.div_rn({a}, {b})"


def _sqrt(x: str, dtype: DType) -> str:
    return f"tl.sqrt({x})" if dtype is DType.F64 else f"tl.sqrt_rn({x})"


def _convert(text: str, source: DType, result: DType) -> str:
    if result is DType.BOOL:
        return f"{text} != 0"
    if result.is_low_precision:
        wide = text if source.compute is DType.F32 else f"{text}.to(tl.float32)"
        return wide if source in (DType.BOOL, result) else rounded(wide, result)
    if source.is_float and result.is_int and result.itemsize < 4:
        return f"{text}.to(tl.int32).to({type_text(result)})"
    return f"{text}.to({type_text(result)})"


def _bitcast(text: str, source: DType, result: DType) -> str:
    if source.is_low_precision:
        text = f"{text}.to({type_text(source)})"
    text = f"{text}.to({type_text(result)}, bitcast=True)"
    return f"{text}.to(tl.float32)" if result.is_low_precision else text
