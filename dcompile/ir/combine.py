"""How two neighbouring partial results become one: the associative rules of scans and of mean and variance.

A rule is one expression a result over the locals ``left(k)`` (what came before) and ``right(k)`` (what follows).
Printers and the reference interpreter bind these locals; rules of one kind and dtype are the same objects, so that a
printer may recognise one that its target has an instruction for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dcompile.ir import expr as ex
from dcompile.ir.types import DType

Rule = tuple[ex.Expr, ...]


def left(k: int, dtype: DType) -> ex.Expr:
    """Part ``k`` of the partial result that comes first."""
    return ex.local(f"left{k}", dtype)


def right(k: int, dtype: DType) -> ex.Expr:
    """Part ``k`` of the partial result that follows it."""
    return ex.local(f"right{k}", dtype)


def bound_to(rule: Rule, lefts: Rule, rights: Rule) -> Rule:
    """``rule`` of the given partial results."""
    names = {f"left{k}": e for k, e in enumerate(lefts)} | {f"right{k}": e for k, e in enumerate(rights)}

    def leaf(node: ex.Expr) -> ex.Expr | None:
        return names.get(node.name) if isinstance(node, ex.Local) else None

    return tuple(ex.transform(e, leaf) for e in rule)


def extreme(dtype: DType, highest: bool) -> bool | int | float:
    """The largest or smallest value of a dtype, infinite for floats."""
    if dtype.is_float:
        return math.inf if highest else -math.inf
    if dtype is DType.BOOL:
        return highest
    limits = torch.iinfo(dtype.torch)
    return int(limits.max if highest else limits.min)


def neutral(kind: str, dtype: DType) -> tuple[ex.Const, ...]:
    """What changes nothing when it is combined, one constant a result. ``dtype`` is that of the operand.

    Raises:
        ValueError: a kind that has none.
    """
    if kind in ("welford", "welford_merge"):
        return (ex.const(0, dtype),) * 3
    if kind in ("cummax", "cummin"):
        return ex.const(extreme(dtype, kind == "cummin"), dtype), ex.const(0, DType.I64)
    values: dict[str, bool | int | float] = {
        "sum": 0, "xor": 0, "any": False, "prod": 1, "max": extreme(dtype, False), "min": extreme(dtype, True),
        "logaddexp": -math.inf,
    }  # fmt: skip
    if kind not in values:
        raise ValueError(f"{kind} has no neutral element")
    return (ex.const(values[kind], dtype),)


def rule(kind: str, dtype: DType) -> Rule:
    """The rule of a kind for operands of ``dtype``: sum, prod, max, min (NaN wins), any, xor, logaddexp, cummax and
    cummin (value and position: the latest best one, NaN beating every number), welford_merge.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in _RULES:
        raise ValueError(f"no rule to combine {kind!r}")
    return _RULES[kind](dtype)


def _binary(name: str) -> Callable[[DType], Rule]:
    return lambda dtype: (ex.op(name, left(0, dtype), right(0, dtype)),)


def _logical(arithmetic: str, logical: str) -> Callable[[DType], Rule]:
    return lambda dtype: (ex.op(logical if dtype is DType.BOOL else arithmetic, left(0, dtype), right(0, dtype)),)


def _extremum(highest: bool) -> Callable[[DType], Rule]:
    def build(dtype: DType) -> Rule:
        a, b = left(0, dtype), right(0, dtype)
        if dtype is DType.BOOL:
            return (ex.op("or" if highest else "and", a, b),)
        return (ex.op("maximum" if highest else "minimum", a, b),)

    return build


def _logaddexp(dtype: DType) -> Rule:
    """``max + log1p(exp(-|a - b|))``; equal infinities give themselves."""
    a, b = left(0, dtype), right(0, dtype)
    top, low = ex.op("maximum", a, b), ex.op("minimum", a, b)
    apart = ex.op("add", top, ex.op("log1p", ex.op("exp", ex.op("sub", low, top))))
    return (ex.op("where", ex.op("and", ex.op("eq", a, b), ex.op("isinf", a)), a, apart),)


def _running_best(highest: bool) -> Callable[[DType], Rule]:
    def build(dtype: DType) -> Rule:
        a, b = left(0, dtype), right(0, dtype)
        later = better_or_equal(a, b, highest)
        where = (left(1, DType.I64), right(1, DType.I64))
        return ex.op("where", later, b, a), ex.op("where", later, where[1], where[0])

    return build


def better_or_equal(a: ex.Expr, b: ex.Expr, highest: bool) -> ex.Expr:
    """Whether ``b`` is at least as good as ``a``; NaN is best of all."""
    if a.dtype is DType.BOOL:
        a, b = ex.to(a, DType.I64), ex.to(b, DType.I64)
    found = ex.op("ge" if highest else "le", b, a)
    return ex.op("or", ex.op("isnan", b), found) if a.dtype.is_float else found


def first_best(a: ex.Expr, b: ex.Expr, highest: bool) -> ex.Expr:
    """Whether the later ``b`` beats ``a``: strictly better, or the first NaN."""
    if a.dtype is DType.BOOL:
        a, b = ex.to(a, DType.I64), ex.to(b, DType.I64)
    found = ex.op("gt" if highest else "lt", b, a)
    if not a.dtype.is_float:
        return found
    number = ex.op("not", ex.op("isnan", a))
    return ex.op("or", found, ex.op("and", ex.op("isnan", b), number))


def _welford_merge(dtype: DType) -> Rule:
    """Means, sums of squared distances and weights of two parts (Chan, Golub, LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979).

    A part without weight changes nothing. Equal infinite means stay what they are; their squared distances are NaN, as
    eager PyTorch's variance is.
    """
    ma, sa, na = (left(k, dtype) for k in range(3))
    mb, sb, nb = (right(k, dtype) for k in range(3))
    zero = ex.const(0, dtype)
    apart = ex.op("sub", mb, ma)
    total = ex.op("add", na, nb)
    share = ex.op("where", ex.op("eq", total, zero), zero, ex.op("div", nb, total))
    step = ex.op("where", ex.op("eq", ma, mb), zero, ex.op("mul", apart, share))
    between = ex.op("mul", ex.op("mul", apart, apart), ex.op("mul", na, share))
    merged = ex.op("add", ma, step), ex.op("add", ex.op("add", sa, sb), between)
    alone, absent = ex.op("eq", na, zero), ex.op("eq", nb, zero)
    mean, squares = (
        ex.op("where", absent, a, ex.op("where", alone, b, both))
        for a, b, both in zip((ma, sa), (mb, sb), merged, strict=True)
    )
    return mean, squares, total


_RULES: dict[str, Callable[[DType], Rule]] = {
    "sum": _logical("add", "or"),
    "prod": _logical("mul", "and"),
    "any": _binary("or"),
    "xor": _binary("xor"),
    "max": _extremum(True),
    "min": _extremum(False),
    "logaddexp": _logaddexp,
    "cummax": _running_best(True),
    "cummin": _running_best(False),
    "welford_merge": _welford_merge,
}
