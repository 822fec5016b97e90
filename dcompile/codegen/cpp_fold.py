"""Accumulators of a fold: their variables, how one element enters, how two partial results combine.

Every float sum runs in blocks: a block of at most ``BLOCK`` elements is summed in single precision (in vector lanes
where the axis is simd), blocks are added up in double precision. The error of a sum of n elements is then that of one
block whatever n is (pairwise summation's bound with a wide leaf; Higham, "The accuracy of floating point summation",
SIAM J. Sci. Comput. 14, 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcompile.codegen.cpp_types import literal, register_type
from dcompile.errors import CompilerBug
from dcompile.ir.kernel import Accumulator
from dcompile.ir.types import DType

BLOCK = 4096
"""Elements of a simd axis summed in single precision before they enter the double-precision total: 256 per lane of a
512-bit vector, at one horizontal sum for every 4096 elements (under 1 % at 75 GB/s from the first-level cache)."""

SERIAL_BLOCK = 128
"""The same for a sum that runs element after element: a column sum of 5000 rows was ten times less accurate than eager
PyTorch with 4096, and is more accurate than it with 128."""

INTEGER_RANGE = {
    DType.I64: (-(2**63), 2**63 - 1),
    DType.I32: (-(2**31), 2**31 - 1),
    DType.I16: (-(2**15), 2**15 - 1),
    DType.I8: (-(2**7), 2**7 - 1),
    DType.U8: (0, 255),
    DType.BOOL: (0, 1),
}


_BOOL_SIGN = {"prod": "&", "xor": "^"}


@dataclass(frozen=True)
class Variable:
    """One C++ variable of an accumulator.

    Attributes:
        suffix: appended to the accumulator's C++ name.
        type: C++ type.
        start: initial value.
        clause: operator of an OpenMP ``reduction`` clause that combines lanes; None if no clause can.
    """

    suffix: str
    type: str
    start: str
    clause: str | None


class Folding:
    """One accumulator of a fold as C++ text.

    Args:
        acc: the accumulator.
        name: its C++ name.
        blocked: a sum that runs in blocks.
    """

    def __init__(self, acc: Accumulator, name: str, blocked: bool) -> None:
        self.acc = acc
        self.name = name
        self.dtype = acc.expr.dtype
        self.is_sum = acc.kind == "sum" and register_type(self.dtype) == "float"
        self.blocked = blocked and self.is_sum
        self.best = {"max": "max", "argmax": "max", "min": "min", "argmin": "min"}.get(acc.kind)
        self.is_arg = acc.kind in ("argmax", "argmin")

    @property
    def type(self) -> str:
        return register_type(self.dtype)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Variables that live through the whole fold."""
        if self.blocked:
            return (Variable("_total", "double", "0.0", None),)
        return self.inner

    @property
    def inner(self) -> tuple[Variable, ...]:
        """Variables of the innermost loop: those of one block, or of the whole fold when it is not blocked."""
        if self.is_arg:
            return (Variable("_best", self.type, self._worst, None), Variable("", "int64_t", "0", None))
        if self.best is not None and self.dtype.is_float:
            return (Variable("", self.type, self._worst, self.best), Variable("_nan", "int", "0", "|"))
        if self.best is not None:
            return (Variable("", self.type, self._worst, self.best),)
        zero, one = literal(0, self.dtype), literal(1, self.dtype)
        starts = {"sum": (zero, "+"), "prod": (one, "*"), "any": ("false", "|"), "xor": (zero, "^")}
        start, clause = starts[self.acc.kind]
        if self.dtype is DType.BOOL:
            clause = {"+": "|", "*": "&"}.get(clause, clause)
        return (Variable("", self.type, start, clause),)

    @property
    def _worst(self) -> str:
        """The value that every element is at least as good as."""
        low = self.best == "max"
        if self.dtype.is_float:
            return literal(float("-inf") if low else float("inf"), self.dtype)
        return literal(INTEGER_RANGE[self.dtype][0 if low else 1], self.dtype)

    @property
    def clauses(self) -> tuple[str, ...]:
        """OpenMP reduction clauses of the innermost loop; empty if lanes cannot be combined by clauses."""
        if any(v.clause is None for v in self.inner):
            return ()
        return tuple(f"reduction({v.clause}:{self.name}{v.suffix})" for v in self.inner)

    def update(self, values: Sequence[str], position: str, at: str = "") -> list[str]:
        """Statements that take one element in; ``at`` is the subscript of lane arrays."""
        name, value = self.name + at, values[0]
        if self.is_arg:
            return self._take_best(f"{self.name}_best{at}", name, value, position)
        if self.best is not None:
            lines = [f"{name} = {value} {self._better} {name} ? {value} : {name};"]
            return lines + ([f"{self.name}_nan{at} |= {value} != {value};"] if self.dtype.is_float else [])
        return [f"{name} = {self._combine(name, value)};"]

    def _take_best(self, best: str, where: str, value: str, position: str) -> list[str]:
        taken = f"{value} {self._better} {best}"
        if self.dtype.is_float:  # the first NaN beats every number
            taken = f"({taken}) | (({value} != {value}) & ({best} == {best}))"
        flag = f"{self.name}_take"
        return [
            f"const bool {flag} = {taken};",
            f"{best} = {flag} ? {value} : {best};",
            f"{where} = {flag} ? (int64_t)({position}) : {where};",
        ]

    @property
    def _better(self) -> str:
        return ">" if self.best == "max" else "<"

    def _combine(self, a: str, b: str) -> str:
        if self.dtype is DType.BOOL:
            return f"(bool)({a} {_BOOL_SIGN.get(self.acc.kind, '|')} {b})"
        sign = {"sum": "+", "prod": "*", "xor": "^"}.get(self.acc.kind)
        if sign is None:
            raise CompilerBug(f"fold {self.acc.kind} of {self.dtype.value}")
        return f"({self.type})({a} {sign} {b})" if self.dtype.is_int and self.dtype.itemsize < 4 else f"{a} {sign} {b}"

    def close_block(self, at: str = "") -> list[str]:
        """Statements that add a finished block to the total."""
        return [f"{self.name}_total{at} += {self.name}{at};"]

    def merge(self, part: str, at: str) -> list[str]:
        """Statements that take in the later partial result ``part``, whose arrays are subscripted by ``at``."""
        if self.blocked:
            return [f"{self.name}_total += {part}_total{at};"]
        if self.is_arg:
            return self._take_best(f"{self.name}_best", self.name, f"{part}_best{at}", f"{part}{at}")
        if self.best is not None:
            lines = [f"{self.name} = {part}{at} {self._better} {self.name} ? {part}{at} : {self.name};"]
            return lines + ([f"{self.name}_nan |= {part}_nan{at};"] if self.dtype.is_float else [])
        return [f"{self.name} = {self._combine(self.name, part + at)};"]

    def results(self, at: str = "") -> tuple[str, ...]:
        """The finished values, one a result of the kind."""
        return (self._result(at),)

    def _result(self, at: str) -> str:
        if self.is_arg:
            return self.name + at
        if self.best is not None and self.dtype.is_float:
            return f"{self.name}_nan{at} ? {literal(float('nan'), self.dtype)} : {self.name}{at}"
        text = f"(float){self.name}_total{at}" if self.blocked else self.name + at
        return f"dc::round_{self.dtype.value}({text})" if self.dtype.is_low_precision else text
