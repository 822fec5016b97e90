"""Activations and their gradients."""

from __future__ import annotations

import math
from typing import Any

from dcompile.ir.expr import Expr, op
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.pointwise import elementwise, literal
from dcompile.lower.table import rule

_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715
"""Tanh approximation of GELU: Hendrycks & Gimpel, arXiv 1606.08415, section 2."""


def _mul(*factors: Expr) -> Expr:
    product = factors[0]
    for factor in factors[1:]:
        product = op("mul", product, factor)
    return product


def _one_minus(v: Expr) -> Expr:
    return op("sub", literal(v, 1.0), v)


@rule("relu")
def relu(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("maximum", v, literal(v, 0)), x)


@rule("silu")
def silu(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: _mul(v, op("sigmoid", v)), x)


@rule("silu_backward")
def silu_backward(b: Lowering, grad: Any, x: Any) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        s = op("sigmoid", v)
        return _mul(g, s, op("add", literal(v, 1.0), _mul(v, _one_minus(s))))

    return elementwise(b, formula, grad, x)


def _tanh_argument(v: Expr) -> Expr:
    cubed = _mul(v, v, v)
    return _mul(literal(v, _TANH_SCALE), op("add", v, _mul(literal(v, _TANH_CUBE), cubed)))


@rule("gelu")
def gelu(b: Lowering, x: Any, approximate: str = "none") -> Value:
    def formula(v: Expr) -> Expr:
        if approximate == "tanh":
            soft = op("tanh", _tanh_argument(v))
        else:
            soft = op("erf", _mul(v, literal(v, _SQRT_HALF)))
        return _mul(_mul(literal(v, 0.5), v), op("add", literal(v, 1.0), soft))

    return elementwise(b, formula, x)


@rule("gelu_backward")
def gelu_backward(b: Lowering, grad: Any, x: Any, approximate: str = "none") -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        half, one = literal(v, 0.5), literal(v, 1.0)
        if approximate == "tanh":
            t = op("tanh", _tanh_argument(v))
            slope = _mul(literal(v, _TANH_SCALE), op("add", one, _mul(literal(v, 3 * _TANH_CUBE), v, v)))
            cdf = _mul(half, op("add", one, t))
            return _mul(g, op("add", cdf, _mul(half, v, _one_minus(_mul(t, t)), slope)))
        cdf = _mul(half, op("add", one, op("erf", _mul(v, literal(v, _SQRT_HALF)))))
        density = _mul(op("exp", _mul(literal(v, -0.5), v, v)), literal(v, 1 / math.sqrt(2 * math.pi)))
        return _mul(g, op("add", cdf, _mul(v, density)))

    return elementwise(b, formula, grad, x)


@rule("sigmoid_backward")
def sigmoid_backward(b: Lowering, grad: Any, y: Any) -> Value:
    return elementwise(b, lambda g, v: _mul(g, _one_minus(v), v), grad, y)


@rule("tanh_backward")
def tanh_backward(b: Lowering, grad: Any, y: Any) -> Value:
    return elementwise(b, lambda g, v: _mul(g, _one_minus(_mul(v, v))), grad, y)


@rule("threshold_backward")
def threshold_backward(b: Lowering, grad: Any, x: Any, threshold: Any) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        return op("where", op("le", v, literal(v, threshold)), literal(g, 0), g)

    return elementwise(b, formula, grad, x)


@rule("threshold")
def threshold(b: Lowering, x: Any, limit: Any, value: Any) -> Value:
    return elementwise(b, lambda v: op("where", op("le", v, literal(v, limit)), literal(v, value), v), x)


@rule("leaky_relu")
def leaky_relu(b: Lowering, x: Any, slope: float = 0.01) -> Value:
    return elementwise(b, lambda v: op("where", op("gt", v, literal(v, 0)), v, _mul(v, literal(v, slope))), x)


@rule("leaky_relu_backward")
def leaky_relu_backward(b: Lowering, grad: Any, x: Any, slope: float, of_result: bool) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        return op("where", op("gt", v, literal(v, 0)), g, _mul(g, literal(g, slope)))

    return elementwise(b, formula, grad, x)


@rule("elu")
def elu(b: Lowering, x: Any, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Value:
    def formula(v: Expr) -> Expr:
        negative = _mul(op("expm1", _mul(v, literal(v, input_scale))), literal(v, alpha * scale))
        return op("where", op("le", v, literal(v, 0)), negative, _mul(v, literal(v, scale)))

    return elementwise(b, formula, x)


@rule("elu_backward")
def elu_backward(
    b: Lowering, grad: Any, alpha: Any, scale: Any, input_scale: Any, is_result: bool, saved: Any
) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        if is_result:
            slope = _mul(literal(v, input_scale), op("add", v, literal(v, alpha * scale)))
        else:
            slope = _mul(literal(v, input_scale * alpha * scale), op("exp", _mul(v, literal(v, input_scale))))
        return op("where", op("le", v, literal(v, 0)), _mul(g, slope), _mul(g, literal(g, scale)))

    return elementwise(b, formula, grad, saved)


@rule("hardtanh_backward")
def hardtanh_backward(b: Lowering, grad: Any, x: Any, low: Any, high: Any) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        outside = op("or", op("le", v, literal(v, low)), op("ge", v, literal(v, high)))
        return op("where", outside, literal(g, 0), g)

    return elementwise(b, formula, grad, x)


@rule("softplus")
def softplus(b: Lowering, x: Any, beta: Any = 1, limit: Any = 20) -> Value:
    def formula(v: Expr) -> Expr:
        scaled = _mul(v, literal(v, beta))
        soft = op("div", op("log1p", op("exp", scaled)), literal(v, beta))
        return op("where", op("gt", scaled, literal(v, limit)), v, soft)

    return elementwise(b, formula, x)


@rule("softplus_backward")
def softplus_backward(b: Lowering, grad: Any, x: Any, beta: Any, limit: Any) -> Value:
    def formula(g: Expr, v: Expr) -> Expr:
        scaled = _mul(v, literal(v, beta))
        return op("where", op("gt", scaled, literal(v, limit)), g, _mul(g, op("sigmoid", scaled)))

    return elementwise(b, formula, grad, x)


def _hard_gate(v: Expr) -> Expr:
    """``clamp(v + 3, 0, 6)``."""
    return op("minimum", op("maximum", op("add", v, literal(v, 3.0)), literal(v, 0.0)), literal(v, 6.0))


@rule("hardsigmoid")
def hardsigmoid(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("div", _hard_gate(v), literal(v, 6.0)), x)


@rule("hardswish")
def hardswish(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: op("div", _mul(v, _hard_gate(v)), literal(v, 6.0)), x)


@rule("mish")
def mish(b: Lowering, x: Any) -> Value:
    return elementwise(b, lambda v: _mul(v, op("tanh", op("log1p", op("exp", v)))), x)


@rule("_prelu_kernel")
def prelu(b: Lowering, x: Any, weight: Any) -> Value:
    return elementwise(b, lambda v, w: op("where", op("gt", v, literal(v, 0)), v, _mul(w, v)), x, weight)
