"""Pieces of Python text for host programs: identifiers, sizes, shapes, arguments of library calls."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping

import sympy
import torch

from dcompile.errors import CompilerBug
from dcompile.ir.index import FloorDiv, Mod
from dcompile.ir.nodes import Arg, Literal, Ref
from dcompile.ir.types import DType, Origin, Size

LITERAL_KINDS = frozenset({"memory_format", "layout"})
"""Literals that are attributes of the torch module under their own name."""


class Namer:
    """Gives every IR name a Python identifier of its own, as close to it as possible.

    Args:
        reserved: identifiers that the program uses for something else.
    """

    def __init__(self, reserved: frozenset[str]) -> None:
        self._taken = set(reserved) | set(keyword.kwlist)
        self._given: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """The identifier of an IR name; always the same for the same name."""
        found = self._given.get(name)
        if found is None:
            found = self._given[name] = self.fresh(name)
        return found

    def fresh(self, wish: str) -> str:
        """An identifier like ``wish`` that nothing else has."""
        stem = re.sub(r"\W", "_", wish, flags=re.ASCII)
        if not stem or stem[0].isdigit() or stem.startswith("__"):
            stem = "v" + stem
        name, number = stem, 1
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name


def size_text(size: Size, names: Mapping[sympy.Symbol, str]) -> str:
    """A size as a Python expression over the variables ``names``.

    Raises:
        CompilerBug: a symbol without a variable, or a function integers do not need.
    """
    return _text(sympy.sympify(size), names) if not isinstance(size, int) else str(size)


def _text(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    if expr.is_Integer:
        return str(int(expr))
    if expr.is_Symbol:
        if expr not in names:
            raise CompilerBug(f"host program: size {expr} is not known when it is needed")
        return names[expr]
    parts = [_text(arg, names) for arg in expr.args]
    if isinstance(expr, sympy.Add):
        return f"({' + '.join(parts)})"
    if isinstance(expr, sympy.Mul):
        return f"({' * '.join(parts)})"
    if isinstance(expr, FloorDiv):
        return f"({parts[0]} // {parts[1]})"
    if isinstance(expr, Mod | sympy.Mod):
        return f"({parts[0]} % {parts[1]})"
    if isinstance(expr, sympy.Pow) and expr.args[1].is_Integer and expr.args[1] >= 0:
        return f"({parts[0]} ** {parts[1]})"
    if isinstance(expr, sympy.Max | sympy.Min):
        return f"{type(expr).__name__.lower()}({', '.join(parts)})"
    raise CompilerBug(f"host program: cannot print {expr} as an integer")


def tuple_text(parts: list[str]) -> str:
    """A tuple display."""
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def sizes_text(sizes: tuple[Size, ...], names: Mapping[sympy.Symbol, str]) -> str:
    """A shape or strides as a tuple display."""
    return tuple_text([size_text(size, names) for size in sizes])


def dtype_text(dtype: DType) -> str:
    return str(dtype.torch)


def arg_text(
    arg: Arg,
    names: Mapping[sympy.Symbol, str],
    tensor: Callable[[str], str],
    device: Callable[[str], str],
    program: Callable[[str], str] | None = None,
) -> str:
    """An argument of a library call.

    Args:
        tensor: the expression of a tensor operand.
        device: the expression of a device type.
        program: the expression of a program that is called; if given, sequences are printed as tuples.

    Raises:
        CompilerBug: an argument of a kind that ``ir.nodes.Arg`` does not list.
    """
    if isinstance(arg, Ref):
        return f"{tensor(arg.name)}.item()" if arg.item else tensor(arg.name)
    if isinstance(arg, Literal):
        if arg.kind in ("graph", "module") and program is not None:
            return program(arg.value)
        return _literal_text(arg, device)
    if isinstance(arg, tuple | list):
        parts = [arg_text(item, names, tensor, device, program) for item in arg if not _is_dict(item)]
        if arg and _is_dict(arg[0]):
            keys = [key for key in arg[0].value.split(",") if key]
            return f"{{{', '.join(f'{key!r}: {part}' for key, part in zip(keys, parts, strict=True))}}}"
        return tuple_text(parts) if program is not None else f"[{', '.join(parts)}]"
    if isinstance(arg, float) and not math.isfinite(arg):
        return f'float("{arg}")'
    if arg is None or isinstance(arg, bool | int | float | str):
        return repr(arg)
    if isinstance(arg, sympy.Expr):
        return size_text(arg, names)
    raise CompilerBug(f"host program: cannot print argument {arg!r}")


def _is_dict(arg: Arg) -> bool:
    """Whether the rest of the sequence that ``arg`` begins are the values of a dictionary, its keys in ``arg``."""
    return isinstance(arg, Literal) and arg.kind == "dict"


def _literal_text(literal: Literal, device: Callable[[str], str]) -> str:
    if literal.kind == "dtype":
        return dtype_text(DType(literal.value))
    if literal.kind == "device":
        return device(literal.value)
    if literal.kind == "complex":
        return f"complex({str(complex(literal.value))!r})"
    if literal.kind in LITERAL_KINDS and hasattr(torch, literal.value):
        return f"torch.{literal.value}"
    raise CompilerBug(f"host program: cannot print {literal}")


def where_text(origin: Origin, shown_ops: int = 4) -> str:
    """``"aten.exp, aten.sum at train.py:41"``: a node's ops, overload names and repeats left out, and source line."""
    ops = list(dict.fromkeys(op.removesuffix(".default") for op in origin.ops))
    more = [f"and {len(ops) - shown_ops} more"] if len(ops) > shown_ops else []
    text = ", ".join(ops[:shown_ops] + more)
    return " at ".join(part for part in (text, origin.source) if part).replace("\n", " ")
