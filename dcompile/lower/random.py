"""Random numbers from a counter: element ``n`` of the tensor drawn with seed ``s`` is ``rand(s, n)``, so that it can be
computed anywhere, any number of times. Seeds come from torch's generator, one a random op, drawn at the start."""

from __future__ import annotations

from typing import Any

from dcompile.errors import Unsupported
from dcompile.ir.expr import Expr, const, load, op
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import SEED_NAMES, Lowering
from dcompile.lower.creation import ramp
from dcompile.lower.pointwise import elementwise, literal
from dcompile.lower.reduction import fold
from dcompile.lower.table import NoRule, rule


def seed(b: Lowering, device: str) -> Expr:
    """A fresh seed, as an i64 value."""
    taken = b.seed_counts.get(device, 0)
    b.seed_counts[device] = taken + 1
    return load(SEED_NAMES[device], (taken,), DType.I64)


def draw(b: Lowering, out: Value, name: str) -> Expr:
    """A random number in f32 for each element of ``out``: ``rand`` in [0, 1) or ``randn``."""
    return op(name, seed(b, out.device), ramp(out.shape), dtype=DType.F32)


def _plain(b: Lowering, kwargs: dict[str, Any]) -> None:
    """Only the default generator and real floats have a rule.

    Raises:
        NoRule: otherwise.
    """
    if kwargs.get("generator") is not None or not b.out_at(0).dtype.is_float:
        raise NoRule


@rule("rand", "rand_like", any_device=True)
def rand(b: Lowering, *_: Any, **kwargs: Any) -> Value:
    """Uniform in [0, 1). Narrow floats are cut, not rounded, by drawing again from fewer levels: 1.0 never appears."""
    _plain(b, kwargs)
    drawn = draw(b, b.out, "rand")
    levels = {DType.F16: 2.0**11, DType.BF16: 2.0**8}.get(b.out.dtype)
    if levels is not None:
        cut = op("floor", op("mul", drawn, const(levels, DType.F32)))
        drawn = op("mul", cut, const(1 / levels, DType.F32))
    return b.pointwise(b.out, drawn)


@rule("randn", "randn_like", any_device=True)
def randn(b: Lowering, *_: Any, **kwargs: Any) -> Value:
    _plain(b, kwargs)
    return b.pointwise(b.out, draw(b, b.out, "randn"))


def _kept(b: Lowering, out: Value, probability: Any) -> Value:
    """True with ``probability`` (a number or a tensor)."""
    chance = b.element(probability, out.shape, DType.F32)
    return b.pointwise(out, op("lt", draw(b, out, "rand"), chance))


@rule("bernoulli.p")
def bernoulli_p(b: Lowering, x: Value, p: Any = 0.5, generator: Any = None) -> Value:
    """True with probability ``p``.

    Raises:
        Unsupported: ``p`` is no probability; eager rejects it too.
    """
    if generator is not None:
        raise NoRule
    if isinstance(p, int | float) and not 0 <= p <= 1:
        raise Unsupported(b.origin, f"bernoulli with probability {p}", "give a number between 0 and 1")
    return _kept(b, b.out, p)


@rule("bernoulli", "bernoulli.Tensor")
def bernoulli(b: Lowering, x: Value, p: Value | None = None, generator: Any = None) -> Value:
    if generator is not None:
        raise NoRule
    chances = x if p is None else p
    _assert_probabilities(b, chances)
    return _kept(b, b.out, chances)


def _assert_probabilities(b: Lowering, p: Value) -> None:
    """The program raises where a number in ``p`` is no probability. Only on the CPU: on a GPU such a check would stop
    the device for good, as eager's does."""
    if p.device != "cpu":
        return
    wrong = b.temp("wrong", DType.BOOL, p.shape, p.device)

    def outside(v: Expr) -> Expr:  # true of NaN too
        return op("not", op("and", op("ge", v, literal(v, 0)), op("le", v, literal(v, 1))))

    elementwise(b, outside, p, out=wrong, dtype=p.dtype)
    dims = range(len(p.shape))
    found = fold(b, b.temp("found", DType.BOOL, (), p.device), "any", wrong, dims, DType.BOOL)
    every = b.pointwise(b.temp("every", DType.BOOL, (), p.device), op("not", load(found.name, (), DType.BOOL)))
    message = f"bernoulli: a probability is not between 0 and 1 ({b.origin.source})"
    b.emit(Extern(outs=(), op="aten._assert_async.msg", args=(Ref(every.name), message), effect=True, origin=b.origin))


@rule("native_dropout")
def native_dropout(b: Lowering, x: Value, p: Any, train: Any = True) -> tuple[Value, Value]:
    """``x * mask / (1 - p)`` and the mask; identity and an all-true mask outside training."""
    out, mask = b.out_at(0), b.out_at(1)
    if train is False or p == 0:
        b.pointwise(mask, const(True, DType.BOOL))
        return b.pointwise(out, b.element(x, out.shape)), mask
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    _kept(b, mask, 1.0 - p)

    def keep(v: Expr, m: Expr) -> Expr:
        return op("mul", op("mul", v, m), const(scale, v.dtype))

    return elementwise(b, keep, x, mask, out=out), mask


@rule("native_dropout_backward")
def native_dropout_backward(b: Lowering, grad: Value, mask: Value, scale: Any) -> Value:
    return elementwise(b, lambda g, m: op("mul", op("mul", g, m), const(scale, g.dtype)), grad, mask)
