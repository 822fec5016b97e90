"""Which parameters of a user's Triton kernel it writes through, read from its source.

Pointers flow through assignments; a store or an atomic writes through every parameter its pointer may come from. What
is not understood (another function, inline assembly, pointers made from numbers, nested functions) writes through all
it is given, so an answer may name too many parameters but never too few.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

_WRITING = frozenset({"store", "atomic_add", "atomic_and", "atomic_cas", "atomic_max", "atomic_min", "atomic_or",
                      "atomic_xchg", "atomic_xor"})  # fmt: skip
"""Functions of ``triton.language`` that write through their first argument."""
_READING = frozenset({"load"})
"""Those whose result is no pointer."""
_OPAQUE = ("inline_asm_elementwise", "pointer_type", "extern_elementwise", "descriptor")


def written_parameters(kernel: Any) -> frozenset[str]:
    """Names of the parameters that ``kernel`` (a JIT function, autotuned or not) may write through; all if unsure."""
    function = kernel
    while not inspect.isfunction(function) and hasattr(function, "fn"):
        function = function.fn
    everything = frozenset(getattr(kernel, "arg_names", ()) or inspect.signature(function).parameters)
    try:
        source = textwrap.dedent(inspect.getsource(function))
        (definition,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except (OSError, TypeError, SyntaxError, ValueError):
        return everything
    if any(word in source for word in _OPAQUE):
        return everything
    languages = _languages(function)
    return _Flow(definition, languages).run() & everything


def _languages(function: Any) -> frozenset[str]:
    """Names by which the function's module calls ``triton.language``."""
    names = getattr(function, "__globals__", {})
    return frozenset(name for name, value in names.items() if getattr(value, "__name__", "") == "triton.language")


class _Flow(ast.NodeVisitor):
    """Follows parameters through the names of one function until nothing changes."""

    def __init__(self, definition: ast.FunctionDef, languages: frozenset[str]) -> None:
        self.definition, self.languages = definition, languages
        arguments = definition.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self.origins: dict[str, frozenset[str]] = {p.arg: frozenset({p.arg}) for p in parameters}
        self.written: frozenset[str] = frozenset()

    def run(self) -> frozenset[str]:
        before: object = None
        while before != (self.origins, self.written):
            before = (dict(self.origins), self.written)
            for statement in self.definition.body:
                self.visit(statement)
        return self.written

    def of(self, node: ast.AST | None) -> frozenset[str]:
        """Parameters that a value may point into."""
        if node is None:
            return frozenset()
        if isinstance(node, ast.Name):
            return self.origins.get(node.id, frozenset())
        if isinstance(node, ast.Call) and self._language_function(node) in _READING:
            return frozenset()
        return frozenset().union(*(self.of(child) for child in ast.iter_child_nodes(node)))

    def _language_function(self, node: ast.Call) -> str | None:
        """The function of ``triton.language`` that is called, None for any other."""
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            return called.attr if called.value.id in self.languages else None
        return None

    def _bind(self, target: ast.AST, origins: frozenset[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.origins[node.id] = self.origins.get(node.id, frozenset()) | origins

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, self.of(node.value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._bind(node.target, self.of(node.value))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._bind(node.target, self.of(node.value))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, self.of(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self.of(node.iter))
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._bind(item.optional_vars, self.of(item.context_expr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._language_function(node)
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name in _WRITING:
            pointers = node.args[:1] or [k.value for k in node.keywords if k.arg in ("pointer", None)]
            for pointer in pointers:
                self.written |= self.of(pointer)
        elif name is None and not _is_builtin(node.func):
            for value in values:  # a function that is not looked into
                self.written |= self.of(value)
            if isinstance(node.func, ast.Attribute):
                self.written |= (
                    self.of(node.func.value) if node.func.attr not in ("to", "trans", "reshape") else frozenset()
                )
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.written |= frozenset(self.origins)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.written |= frozenset(self.origins)


def _is_builtin(function: ast.AST) -> bool:
    return isinstance(function, ast.Name) and function.id in (
        "range",
        "min",
        "max",
        "len",
        "int",
        "float",
        "bool",
        "abs",
    )


__all__ = ["written_parameters"]
