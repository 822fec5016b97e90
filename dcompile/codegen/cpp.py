"""C++ for every kernel of a graph, in one translation unit. The printer takes no decisions: it prints ``ir.kernel``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files

import sympy

from dcompile.codegen.cpp_kernel import Printer
from dcompile.codegen.cpp_scope import Emitter
from dcompile.codegen.cpp_types import storage_type
from dcompile.ir import expr as ex
from dcompile.ir.canonical import Canonical, canonical, size_parameters
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Nest, Scratch, Stmt, extents, statements
from dcompile.ir.ops import PRODUCTS
from dcompile.ir.types import Origin, Value

NAMED_OPS = 4
"""Source ops that enter a function's name; the comment above it lists all."""

COMMENTED_LINES = 6
"""Source lines listed above a function that serves several kernels."""


@dataclass(frozen=True)
class KernelCall:
    """One call of a printed function.

    Attributes:
        function: C symbol.
        buffers: values whose data pointers are passed, in order (a target and its next version both appear).
        sizes: size symbols whose values follow as int64; the thread count comes last.
    """

    function: str
    buffers: tuple[str, ...]
    sizes: tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class Signature:
    """Parameters of a printed function: ``buffers`` pointers, ``sizes`` int64 sizes, then the int64 thread count."""

    buffers: int
    sizes: int


@dataclass(frozen=True)
class CppModule:
    """A translation unit.

    Attributes:
        source: its text, complete in itself.
        calls: for each kernel's position in ``graph.nodes`` how to call it.
        signatures: every C symbol of the unit. A function returns 0; 1 if an index was out of range; 2 if an integer
            was divided by zero.
    """

    source: str
    calls: Mapping[int, KernelCall] = field(default_factory=dict)
    signatures: Mapping[str, Signature] = field(default_factory=dict)


def print_cpp(graph: Graph) -> CppModule:
    """The kernels of a KERNELS or ORDERED graph; identical ones are printed once.

    Raises:
        CompilerBug: a kernel breaks the rules of ``ir.kernel`` (unknown name, complex elements).
    """
    values = {name: found for name, found in graph.defs.items() if isinstance(found, Value)}
    shared: dict[str, tuple[Canonical, list[Origin]]] = {}
    uses: dict[int, tuple[str, Canonical]] = {}
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Kernel) and all(out.device == "cpu" for out in node.outs):
            form = canonical(node, values)
            shared.setdefault(form.key, (form, []))[1].append(node.origin)
            uses[position] = (form.key, form)
    names = {key: _function_name(number, origins[0]) for number, (key, (_, origins)) in enumerate(shared.items())}
    texts, signatures = [prelude()], {}
    for key, (form, origins) in shared.items():
        texts.append(_function(names[key], form, values, origins))
        signatures[names[key]] = Signature(len(form.buffers), len(form.symbols))
    calls = {at: KernelCall(names[key], form.buffers, form.symbols) for at, (key, form) in uses.items()}
    if any("dc::special_" in text for text in texts):
        texts.insert(1, special_functions())
    return CppModule("\n".join(texts), calls, signatures)


@lru_cache(maxsize=1)
def special_functions() -> str:
    """What follows ``prelude`` where a kernel calls a special function."""
    return files("dcompile.codegen").joinpath("prelude_special.h").read_text()


@lru_cache(maxsize=1)
def prelude() -> str:
    """The helper functions every translation unit starts with."""
    folder = files("dcompile.codegen")
    return "".join(folder.joinpath(name).read_text() for name in ("prelude.h", "prelude_math.h"))


def without_products(body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
    """Matrix products as the sums that they are: this printer has nothing faster for them."""

    def plain(acc: Accumulator) -> Accumulator:
        if acc.kind not in PRODUCTS:
            return acc
        a, b = (ex.to(e, acc.dtype) for e in acc.exprs)
        return Accumulator(acc.name, "sum", ex.op("mul", a, b))

    made: list[Stmt] = []
    for stmt in body:
        if isinstance(stmt, Nest):
            stmt = replace(stmt, body=without_products(stmt.body))
        elif isinstance(stmt, Fold):
            stmt = replace(stmt, accumulators=tuple(map(plain, stmt.accumulators)))
        made.append(stmt)
    return tuple(made)


def _function_name(number: int, origin: Origin) -> str:
    """``k3_softmax_exp_sum``: unique by its number, readable by its first ops."""
    stems = []
    for op in origin.ops:
        parts = op.split(".")
        stem = parts[1] if len(parts) > 1 else parts[0]
        stem = "".join(c if c.isalnum() else "_" for c in stem).strip("_")
        if stem and stem not in stems:
            stems.append(stem)
    return "_".join([f"k{number}", *stems[:NAMED_OPS]])


def _function(name: str, form: Canonical, values: Mapping[str, Value], origins: list[Origin]) -> str:
    """One function with the comment above it."""
    kernel = form.kernel
    dtypes = [values[buffer].dtype for buffer in form.buffers]
    buffers = {f"b{n}": (f"b{n}", dtype) for n, dtype in enumerate(dtypes)}
    written = {out.name for out in kernel.outs} | {s.name for s in statements(kernel.body) if isinstance(s, Scratch)}
    out = Emitter(buffers, frozenset(written), extents(kernel.body))
    sizes = [out.fresh("s") for _ in form.symbols]
    for symbol, text in zip(size_parameters(form.symbols).values(), sizes, strict=True):
        out.bind_symbol(symbol, text)
    Printer(out).body(without_products(kernel.body))
    body = out.scopes[0].lines
    failing = any("error)" in line for line in body)
    arguments = [f"{storage_type(dtype)}* {text}" for text, dtype in buffers.values()]
    arguments += [f"int64_t {text}" for text in sizes] + ["int64_t threads"]
    lines = [*_comment(origins), f'extern "C" int64_t {name}({", ".join(arguments)}) {{']
    lines += ["  (void)threads;"] + (["  int64_t error = 0;"] if failing else [])
    lines += ["#" + t[1:] if t.startswith("#") else "  " + t for t in body]
    lines += ["  return dc::error_code(error);" if failing else "  return 0;", "}", ""]
    return "\n".join(lines)


def _comment(origins: list[Origin]) -> list[str]:
    ops = list(dict.fromkeys(op for origin in origins for op in origin.ops))
    sources = list(dict.fromkeys(origin.source for origin in origins if origin.source))
    lines = [f"// {', '.join(ops)}"] if ops else []
    if sources:
        rest = f" and {len(sources) - COMMENTED_LINES} more" if len(sources) > COMMENTED_LINES else ""
        lines.append(f"// {', '.join(sources[:COMMENTED_LINES])}{rest}")
    if len(origins) > 1:
        lines.append(f"// serves {len(origins)} kernels")
    return lines


__all__ = ["CppModule", "KernelCall", "Signature", "prelude", "print_cpp"]
