"""Recognising what the CPU library can do to a result before it stores it: an expression as a named post-operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcompile.ir import expr as ex
from dcompile.ir.expr import Expr, op
from dcompile.ir.types import DType


@dataclass(frozen=True)
class Unary:
    """A post-operation of one operand, in the words of torch's mkldnn ops; no name for none."""

    name: str = ""
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


@dataclass(frozen=True)
class Epilogue:
    """``unary(binary(result, alpha * other))``.

    Attributes:
        binary: ``"add"``, ``"sub"`` or ``"mul"``; None without ``other``.
        other: a buffer read at the same places as the result.
    """

    unary: Unary = Unary()
    binary: str | None = None
    other: str | None = None
    alpha: float = 1.0


X = ex.local("x", DType.F32)
LOW, HIGH = ex.local("low", DType.F32), ex.local("high", DType.F32)


def _c(value: float) -> Expr:
    return ex.const(value, DType.F32)


def _clamped(x: Expr, low: Expr, high: Expr) -> Expr:
    return op("minimum", op("maximum", x, low), high)


_INNER = op("mul", op("add", X, op("mul", op("mul", op("mul", X, X), X), _c(0.044715))), _c(0.7978845608028654))
_SIX = _clamped(op("add", X, _c(3.0)), _c(0.0), _c(6.0))
PATTERNS: tuple[tuple[Expr, Callable[[dict[str, float]], Unary]], ...] = (
    (op("maximum", X, _c(0.0)), lambda _: Unary("relu")),
    (_clamped(X, LOW, HIGH), lambda found: Unary("hardtanh", (found["low"], found["high"]))),
    (
        op("mul", op("mul", X, _c(0.5)), op("add", op("erf", op("mul", X, _c(0.7071067811865476))), _c(1.0))),
        lambda _: Unary("gelu", (), "none"),
    ),
    (
        op("mul", op("mul", X, _c(0.5)), op("add", op("tanh", _INNER), _c(1.0))),
        lambda _: Unary("gelu", (), "tanh"),
    ),
    (op("mul", X, op("sigmoid", X)), lambda _: Unary("swish")),
    (
        op("where", op("gt", X, _c(0.0)), X, op("mul", X, LOW)),
        lambda found: Unary("leaky_relu", (found["low"],)),
    ),
    (op("sigmoid", X), lambda _: Unary("sigmoid")),
    (op("tanh", X), lambda _: Unary("tanh")),
    (op("div", op("mul", X, _SIX), _c(6.0)), lambda _: Unary("hardswish")),
    (op("div", _SIX, _c(6.0)), lambda _: Unary("hardsigmoid")),
)
"""Expressions of ``x`` (and constants ``low``, ``high``) as the lowering writes them, and what they are called."""

_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})


def match_epilogue(root: Expr, result: str) -> Epilogue | None:
    """``root`` as an epilogue of the buffer ``result``; None if it is none. Positions are the caller's to check."""
    for pattern, name in PATTERNS:
        found: dict[str, Expr] = {}
        if _unify(pattern, root, found):
            inner = _linear(found["x"], result)
            numbers = {k: float(v.value) for k, v in found.items() if isinstance(v, ex.Const)}
            if inner is not None:
                return Epilogue(name(numbers), inner.binary, inner.other, inner.alpha)
    return _linear(root, result)


def _linear(root: Expr, result: str) -> Epilogue | None:
    """The result itself, or one operation of it and another buffer."""
    if isinstance(root, ex.Load):
        return Epilogue() if root.buffer == result and not root.bind else None
    if not isinstance(root, ex.Op) or root.name not in ("add", "sub", "mul") or len(root.args) != 2:
        return None
    left, right = root.args
    if root.name != "sub" and isinstance(right, ex.Load) and right.buffer == result:
        left, right = right, left
    ours = isinstance(left, ex.Load) and left.buffer == result and not left.bind
    if not ours or not isinstance(right, ex.Load) or right.buffer == result or right.bind:
        return None
    return Epilogue(Unary(), root.name, right.buffer)


def _unify(pattern: Expr, root: Expr, found: dict[str, Expr]) -> bool:
    """Whether ``root`` is ``pattern`` with its locals filled in: ``x`` by anything, others by constants."""
    if isinstance(pattern, ex.Local):
        if pattern.name != "x" and not isinstance(root, ex.Const):
            return False
        return found.setdefault(pattern.name, root) == root
    if isinstance(pattern, ex.Const):
        return pattern == root
    if not isinstance(pattern, ex.Op) or not isinstance(root, ex.Op) or pattern.name != root.name:
        return False
    orders = [root.args]
    if pattern.name in _COMMUTATIVE:
        orders.append(root.args[::-1])
    for args in orders:
        trial = dict(found)
        if all(_unify(p, a, trial) for p, a in zip(pattern.args, args, strict=True)):
            found.update(trial)
            return True
    return False
