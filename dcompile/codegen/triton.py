"""Triton for every CUDA kernel of a graph, as one Python module. Identical kernels are printed once.

A printed function takes the buffers' addresses, then size symbols (i64), then the address of its fault word (i32): a
kernel leaves 1 there if a data-dependent index was out of range and 2 if an integer was divided by zero, and goes on
with position 0, or divisor 1. ``X`` and ``R`` are block sizes along outer and inner positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sympy

from dcompile.analyse.flops import work
from dcompile.codegen.triton_kernel import KernelPrinter
from dcompile.codegen.triton_launch import Launch, Shape, choose_launch, is_batch, members_of, shape_of
from dcompile.codegen.triton_prelude import PRELUDE
from dcompile.codegen.triton_product import ProductPrinter
from dcompile.codegen.triton_strips import StripPrinter
from dcompile.codegen.triton_text import POINTER, size_python, type_text
from dcompile.codegen.triton_variants import other_launches
from dcompile.ir.canonical import Canonical, canonical, size_parameters
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import product
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Axis
from dcompile.ir.types import DType, Origin, Value

NAMED_OPS = 4
"""Source ops that enter a function's name; the comment above it lists all."""

LEAST_TUNED_BYTES = 8 * 2**20
"""Bytes a kernel moves from which other cuts of it are tried: 3 us on an H100, of which no cut saves much less."""

COMMENTED_LINES = 6
"""Source lines listed above a function that serves several kernels."""


@dataclass(frozen=True)
class KernelCall:
    """One launch of a printed function: values whose addresses are passed, and size symbols, in order."""

    function: str
    buffers: tuple[str, ...]
    sizes: tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class Variant:
    """One way to cut a kernel into programs, printed as a function of its own.

    Attributes:
        name: of the function.
        launch: block sizes and warps.
        programs: Python text of the number of programs, over ``s0``, ``s1``, ... (the sizes).
    """

    name: str
    launch: Launch
    programs: str


@dataclass(frozen=True)
class TritonSignature:
    """How a printed function is compiled and launched.

    Attributes:
        buffers: Triton pointer type of each buffer.
        sizes: i64 parameters that follow.
        variants: the function itself, then the others it may be exchanged for.
        where: ops and source lines, for messages.
        structure: what the kernel computes, on which layouts, in which variants: equal for equal kernels.
        spans, hints: bytes of each buffer, and the values of the sizes, that its speed is judged at.
    """

    buffers: tuple[str, ...]
    sizes: int
    variants: tuple[Variant, ...]
    where: str
    structure: str = ""
    spans: tuple[int, ...] = ()
    hints: tuple[int, ...] = ()

    @property
    def launch(self) -> Launch:
        return self.variants[0].launch

    @property
    def programs(self) -> str:
        return self.variants[0].programs


@dataclass(frozen=True)
class TritonModule:
    """A Python module of kernels.

    Attributes:
        source: its text; imports nothing but triton.
        calls: for each CUDA kernel's position in ``graph.nodes`` how to call it.
        signatures: every function of the module.
    """

    source: str = ""
    calls: Mapping[int, KernelCall] = field(default_factory=dict)
    signatures: Mapping[str, TritonSignature] = field(default_factory=dict)


def print_triton(graph: Graph, launches: Mapping[int, Launch] | None = None, variants: bool = False) -> TritonModule:
    """The CUDA kernels of a KERNELS or ORDERED graph; an empty module if it has none.

    Args:
        launches: how to cut kernels, by position; ``choose_launch`` decides for those not named.
        variants: print other cuts of large kernels too, to be chosen between by measurement.

    Raises:
        CompilerBug: a kernel breaks the rules of ``ir.kernel``, or adds elements no GPU adds atomically.
    """
    values = {name: found for name, found in graph.defs.items() if isinstance(found, Value)}
    shared: dict[tuple[str, Launch], tuple[Canonical, list[Origin]]] = {}
    uses: dict[int, tuple[tuple[str, Launch], Canonical]] = {}
    others: dict[tuple[str, Launch], tuple[Launch, ...]] = {}
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Kernel) and any(out.device == "cuda" for out in node.outs):
            form = canonical(node, values)
            launch = (launches or {}).get(position) or choose_launch(node, graph.size_hints)
            key = (form.key, launch)
            shared.setdefault(key, (form, []))[1].append(node.origin)
            uses[position] = (key, form)
            if variants and work(node, graph).nbytes >= LEAST_TUNED_BYTES:
                others[key] = other_launches(node, launch, graph.size_hints)
    if not uses:
        return TritonModule()
    names = {key: _function_name(number, origins[0]) for number, (key, (_, origins)) in enumerate(shared.items())}
    texts, signatures = [PRELUDE], {}
    for key, (form, origins) in shared.items():
        printed = _batch if is_batch(form.kernel) else _function
        text, signature = printed(names[key], form, key[1], values, origins)
        texts.append(text)
        for launch in others.get(key, ()):
            text, other = printed(f"{names[key]}_v{len(signature.variants)}", form, launch, values, origins)
            texts.append(text)
            signature = replace(signature, variants=(*signature.variants, *other.variants))
        signatures[names[key]] = _judged(signature, form, values, graph)
    calls = {at: KernelCall(names[key], form.buffers, form.symbols) for at, (key, form) in uses.items()}
    return TritonModule("\n\n".join(texts), calls, signatures)


def _judged(signature: TritonSignature, form: Canonical, values: Mapping[str, Value], graph: Graph) -> TritonSignature:
    """``signature`` with what a measurement of its variants needs."""
    if len(signature.variants) == 1:
        return signature
    layouts = [(values[name].dtype.value, str(values[name].shape), str(values[name].stride)) for name in form.buffers]
    hints = tuple(graph.size_hints[symbol] for symbol in form.symbols)
    spans = tuple(_span_bytes(values[name], graph.size_hints) for name in form.buffers)
    text = repr((form.key, layouts, hints, [variant.launch for variant in signature.variants]))
    return replace(signature, structure=text, spans=spans, hints=hints)


def _span_bytes(value: Value, hints: Mapping[sympy.Symbol, int]) -> int:
    """Bytes from the first element of ``value`` to its last."""
    sizes, steps = ([hint(n, dict(hints)) for n in part] for part in (value.shape, value.stride))
    last = sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) if all(sizes) else -1
    return (last + 1) * value.dtype.itemsize


def _function_name(number: int, origin: Origin) -> str:
    """``g3_softmax_exp_sum``: unique by its number, readable by its first ops."""
    stems = []
    for op in origin.ops:
        parts = op.split(".")
        stem = parts[1] if len(parts) > 1 else parts[0]
        stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in stem).strip("_")
        if stem and stem not in stems:
            stems.append(stem)
    return "_".join([f"g{number}", *stems[:NAMED_OPS]])


def _function(
    name: str, form: Canonical, launch: Launch, values: Mapping[str, Value], origins: list[Origin]
) -> tuple[str, TritonSignature]:
    """One function with the comment above it."""
    shape = shape_of(form.kernel)
    dtypes, sizes = _parameters(form, values)
    printing = _printer(shape)
    printer = printing(shape, launch, dtypes, sizes, frozenset(out.name for out in form.kernel.outs), name)
    body = printer.print()
    parameters = [*dtypes, *sizes.values(), "fault", "X: tl.constexpr", "R: tl.constexpr"]
    head = f"def {name}({', '.join(parameters)}):"
    lines = [*printer.helpers, *_comment(origins), "@triton.jit", head, *body, ""]
    variant = Variant(name, launch, _programs(shape, launch, sizes))
    return "\n".join(lines), _signature(form, dtypes, variant, origins)


def _printer(shape: Shape) -> type[KernelPrinter]:
    if shape.product is not None:
        return ProductPrinter
    return KernelPrinter if shape.strips is None else StripPrinter


def _batch(
    name: str, form: Canonical, launch: Launch, values: Mapping[str, Value], origins: list[Origin]
) -> tuple[str, TritonSignature]:
    """A function whose programs are divided among the nests of a batch; different nests are functions of their own."""
    dtypes, _ = _parameters(form, values)
    parts: dict[str, str] = {}
    texts: list[str] = []
    main, start = ["    program = tl.program_id(0)"], 0
    for number, kernel in enumerate(members_of(form.kernel)):
        inner = canonical(kernel, {buffer: replace(values[own], name=buffer) for buffer, own in _owners(form)})
        cut = choose_launch(kernel, {}, launch.num_warps)
        if (part := parts.get(inner.key)) is None:
            part = parts[inner.key] = f"{name}_part{len(parts)}"
            shape = shape_of(inner.kernel)
            own = {f"b{n}": dtypes[buffer] for n, buffer in enumerate(inner.buffers)}
            printer = KernelPrinter(shape, cut, own, {}, frozenset(out.name for out in inner.kernel.outs))
            body = printer.print("program")
            head = f"def {part}({', '.join([*own, 'fault', 'program', 'X: tl.constexpr', 'R: tl.constexpr'])}):"
            texts += ["@triton.jit", head, *body, "", ""]
        end = start + int(_programs(shape_of(kernel), cut, {}))
        main.append(f"    {'if' if number == 0 else 'elif'} program < {end}:")
        offset = f"program - {start}" if start else "program"
        main.append(f"        {part}({', '.join([*inner.buffers, 'fault', offset, str(cut.block), str(cut.inner)])})")
        start = end
    head = f"def {name}({', '.join([*dtypes, 'fault', 'X: tl.constexpr', 'R: tl.constexpr'])}):"
    lines = [*texts, *_comment(origins), "@triton.jit", head, *main, ""]
    return "\n".join(lines), _signature(form, dtypes, Variant(name, launch, str(start)), origins)


def _owners(form: Canonical) -> list[tuple[str, str]]:
    """The canonical name of each buffer beside its name in the graph."""
    return [(f"b{n}", buffer) for n, buffer in enumerate(form.buffers)]


def _parameters(form: Canonical, values: Mapping[str, Value]) -> tuple[dict[str, DType], dict[sympy.Symbol, str]]:
    """Element type of each buffer parameter, and the parameter of each size symbol."""
    dtypes = {f"b{n}": values[buffer].dtype for n, buffer in enumerate(form.buffers)}
    for dtype in dtypes.values():
        type_text(dtype)
    return dtypes, {size: f"s{n}" for n, size in enumerate(size_parameters(form.symbols).values())}


def _signature(
    form: Canonical, dtypes: Mapping[str, DType], variant: Variant, origins: list[Origin]
) -> TritonSignature:
    return TritonSignature(
        buffers=tuple(POINTER[dtype] for dtype in dtypes.values()),
        sizes=len(form.symbols),
        variants=(variant,),
        where=_where(origins),
    )


def _programs(shape: Shape, launch: Launch, sizes: Mapping[sympy.Symbol, str]) -> str:
    """Python text of the number of programs."""
    if (found := shape.product) is not None:
        parts = [_blocks(found.rows, launch.block, sizes), _blocks(found.columns, launch.inner, sizes)]
        return _product_text([*parts, _blocks(found.batch, 1, sizes)])
    parts = [_blocks(shape.outer, launch.block if shape.strips is None else 1, sizes)]
    if (shape.tiled or shape.tiles is not None) and shape.inner is not None:
        parts.append(_blocks(shape.inner, launch.inner, sizes))
    return _product_text(parts)


def _product_text(parts: list[str]) -> str:
    return str(math.prod(map(int, parts))) if all(part.isdigit() for part in parts) else " * ".join(parts)


def _blocks(axes: tuple[Axis, ...], block: int, sizes: Mapping[sympy.Symbol, str]) -> str:
    total = product(tuple(size for _, size in axes))
    return str(-(-total // block)) if isinstance(total, int) else f"(-(-{size_python(total, sizes)} // {block}))"


def _comment(origins: list[Origin]) -> list[str]:
    ops = list(dict.fromkeys(op for origin in origins for op in origin.ops))
    sources = list(dict.fromkeys(origin.source for origin in origins if origin.source))
    lines = [f"# {', '.join(ops)}".replace("\n", " ")] if ops else []
    if sources:
        rest = f" and {len(sources) - COMMENTED_LINES} more" if len(sources) > COMMENTED_LINES else ""
        lines.append(f"# {', '.join(sources[:COMMENTED_LINES])}{rest}".replace("\n", " "))
    return lines


def _where(origins: list[Origin]) -> str:
    ops = dict.fromkeys(op for origin in origins for op in origin.ops)
    sources = dict.fromkeys(origin.source for origin in origins if origin.source)
    return " at ".join(part for part in (", ".join(list(ops)[:NAMED_OPS]), ", ".join(list(sources)[:2])) if part)


__all__ = ["KernelCall", "TritonModule", "TritonSignature", "Variant", "print_triton"]
