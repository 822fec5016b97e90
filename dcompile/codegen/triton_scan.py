"""Scans in Triton: the associative rule as a function of its own, a block at a time, carried from block to block."""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.codegen.triton_expr import op_text
from dcompile.codegen.triton_text import literal
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex


def rule_function(name: str, rule: Sequence[ex.Expr]) -> list[str]:
    """The lines of ``name(left0, ..., right0, ...)``, which gives the combined partial results.

    Raises:
        CompilerBug: the rule reads anything but its partial results.
    """
    count = len(rule)
    parameters = [f"{side}{k}" for side in ("left", "right") for k in range(count)]
    lines = ["@triton.jit", f"def {name}({', '.join(parameters)}):"]
    names: dict[ex.Expr, str] = {}

    def text(node: ex.Expr) -> str:
        if node in names:
            return names[node]
        if isinstance(node, ex.Local):
            if node.name not in parameters:
                raise CompilerBug(f"the rule of a scan reads {node.name}")
            return node.name
        if isinstance(node, ex.Const):
            return literal(node.value, node.dtype)
        if not isinstance(node, ex.Op):
            raise CompilerBug(f"the rule of a scan contains a {type(node).__name__}")
        arguments = tuple(text(arg) for arg in node.args)
        names[node] = f"t{len(names)}"
        lines.append(f"    {names[node]} = {op_text(node.name, arguments, node.args[-1].dtype, node.dtype)}")
        return names[node]

    results = [text(root) for root in rule]
    return [*lines, f"    return {', '.join(results)}", "", ""]


__all__ = ["rule_function"]
