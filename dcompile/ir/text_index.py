"""Text form of index expressions and sizes: sympy over integer symbols, with ``//`` and ``%`` for FloorDiv and Mod.

Grammar::

    sum     = product (("+" | "-") product)*
    product = power (("*" | "/" | "//" | "%") power)*
    power   = "-" power | atom ["**" power]
    atom    = integer | symbol | ("Max" | "Min") "(" sum, ... ")" | "(" sum ")"

Parsing evaluates as sympy does on construction, so every expression in sympy's evaluated form comes back equal.
"""

from __future__ import annotations

from functools import lru_cache

import sympy

from dcompile.ir.index import FloorDiv, Mod, as_size, symbol
from dcompile.ir.tokens import Cursor, quote_name
from dcompile.ir.types import Size

_FUNCTIONS: dict[str, type[sympy.Expr]] = {"Max": sympy.Max, "Min": sympy.Min}
_SUM, _PRODUCT, _POWER, _ATOM = range(4)


def print_index(expr: sympy.Expr | int) -> str:
    """The text of an index expression or size.

    Raises:
        ValueError: the expression holds a function that has no text form.
    """
    return str(expr) if isinstance(expr, int) else _text(expr)[0]


def _inside(expr: sympy.Expr, level: int) -> str:
    text, own = _text(expr)
    return text if own >= level else f"({text})"


@lru_cache(maxsize=65536)
def _text(expr: sympy.Expr) -> tuple[str, int]:
    """The text and the level of its outermost operator."""
    if expr.is_Integer:
        return str(expr), _ATOM if expr >= 0 else _SUM
    if expr.is_Rational:
        return f"{expr.p}/{expr.q}", _SUM
    if expr.is_Symbol:
        return quote_name(expr.name), _ATOM
    if isinstance(expr, sympy.Add):
        return _sum_text(expr), _SUM
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        factors = [_factor(f) for f in (rest.as_ordered_factors() if isinstance(rest, sympy.Mul) else [rest])]
        if coefficient == -1:
            return "-" + "*".join(factors), _SUM
        if coefficient.is_Integer and coefficient < 0:
            return "-" + "*".join([str(-coefficient), *factors]), _SUM
        return "*".join([_inside(coefficient, _POWER), *factors] if coefficient != 1 else factors), _PRODUCT
    if isinstance(expr, sympy.Pow):
        return f"{_inside(expr.base, _ATOM)}**{_inside(expr.exp, _ATOM)}", _POWER
    if isinstance(expr, FloorDiv | Mod):
        left, right = expr.args
        sign = "//" if isinstance(expr, FloorDiv) else "%"
        return f"{_factor(left)} {sign} {_inside(right, _POWER)}", _PRODUCT
    for name, function in _FUNCTIONS.items():
        if isinstance(expr, function):
            return f"{name}({', '.join(_inside(a, _SUM) for a in sorted(expr.args, key=str))})", _ATOM
    raise ValueError(f"index expression {expr} holds {type(expr).__name__}, which has no text form")


def _factor(expr: sympy.Expr) -> str:
    """As an operand of a product; a quotient or remainder stands in parentheses there."""
    return f"({_text(expr)[0]})" if isinstance(expr, FloorDiv | Mod) else _inside(expr, _PRODUCT)


def _sum_text(expr: sympy.Add) -> str:
    parts: list[str] = []
    for term in expr.as_ordered_terms():
        coefficient = term.as_coeff_Mul()[0]
        negative = coefficient.is_negative
        text = _inside(-term if negative else term, _PRODUCT)
        parts.append((" - " if negative else " + ") + text if parts else ("-" if negative else "") + text)
    return "".join(parts)


def read_index(cursor: Cursor) -> sympy.Expr:
    """Parse an index expression at the cursor.

    Raises:
        ParseError: with line, column and what was expected.
    """
    total = _read_product(cursor)
    while cursor.at("+", "-"):
        sign = cursor.next().text
        term = _read_product(cursor)
        total = total + term if sign == "+" else total - term
    return total


def read_size(cursor: Cursor) -> Size:
    """Parse a size: a plain int when it is a number."""
    return as_size(read_index(cursor))


def _read_product(cursor: Cursor) -> sympy.Expr:
    total = _read_power(cursor)
    while cursor.at("*", "/", "//", "%"):
        sign = cursor.next().text
        right = _read_power(cursor)
        if sign == "*":
            total = total * right
        elif sign == "/":
            total = total / right
        else:
            total = FloorDiv(total, right) if sign == "//" else Mod(total, right)
    return total


def _read_power(cursor: Cursor) -> sympy.Expr:
    if cursor.accept("-"):
        return -_read_power(cursor)
    base = _read_atom(cursor)
    return base ** _read_power(cursor) if cursor.accept("**") else base


def _read_atom(cursor: Cursor) -> sympy.Expr:
    token = cursor.peek()
    if token.kind == "int":
        return sympy.Integer(int(cursor.next().text))
    if cursor.accept("("):
        inner = read_index(cursor)
        cursor.expect(")")
        return inner
    if token.kind == "name" and token.text in _FUNCTIONS and cursor.peek(1).text == "(":
        function = _FUNCTIONS[cursor.next().text]
        cursor.next()
        args = [read_index(cursor)]
        while cursor.accept(","):
            args.append(read_index(cursor))
        cursor.expect(")")
        return function(*args)
    return symbol(cursor.name("a number, a symbol or '('"))


def parse_index(text: str) -> sympy.Expr:
    """The index expression ``text`` stands for.

    Raises:
        ParseError: with line, column and what was expected.
    """
    cursor = Cursor(text)
    expr = read_index(cursor)
    cursor.end()
    return expr
