"""Matrix products on a GPU as kernels of our own, together with the elementwise kernel that reads the result.

The library's product is faster, but its result goes through memory and another launch. Which of the two wins depends on
the sizes and the processor, so that it is measured (``Context.measure``): the library's call and the kernel behind it
against the one kernel that does both. Nothing is replaced without a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.context import Context
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import as_expr, product, simplify
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Role, Stmt, Write, expressions
from dcompile.ir.nodes import Axis, Extern, Node, Ref
from dcompile.ir.types import DType, Size, Value, contiguous_stride
from dcompile.schedule.inline import tidy
from dcompile.schedule.loops import Domain, image
from dcompile.schedule.readers import by_memory, elementwise, flat, place

STAGE = "products"

OPS = {
    "aten.mm.default": (2, False),
    "aten.bmm.default": (3, False),
    "aten.addmm.default": (2, True),
    "aten.baddbmm.default": (3, True),
}
"""Products: dimensions of the result, and whether something is added to it."""

DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})

SHORTEST = 16
"""Shortest side of a product that matrix units take."""

WORTH = 0.98
"""Share of the library's time below which the kernel is taken: less is noise of the measurement."""


def product_kernels(graph: Graph, ctx: Context) -> Graph:
    """Replace each product and its reader by one kernel where that is measured to be faster, with a verdict."""
    if ctx.measure is None:
        return graph
    position = 0
    while position < len(graph.nodes):
        site = find_site(graph, position, ctx.tf32)
        if site is not None and _is_faster(graph, site, ctx):
            graph = site.rewrite(graph)
        position += 1
    return graph.check()


@dataclass(frozen=True)
class Product:
    """``out = alpha * a b + beta * addend``; strides of the values say how operands lie."""

    call: Extern
    out: Value
    a: Value
    b: Value
    addend: Value | None
    alpha: float
    beta: float


@dataclass(frozen=True)
class Site:
    """A product whose reader may be computed with it.

    Attributes:
        at, reader: positions of both.
        kernel: does the work of both.
        late: it stands where the reader stood, else where the product stood.
    """

    product: Product
    at: int
    reader: int
    kernel: Kernel
    late: bool

    def rewrite(self, graph: Graph) -> Graph:
        """``graph`` with the kernel."""
        place, gone = (self.reader, self.at) if self.late else (self.at, self.reader)
        nodes = [self.kernel if n == place else node for n, node in enumerate(graph.nodes) if n != gone]
        return graph.with_nodes(tuple(nodes))


def find_site(graph: Graph, position: int, tf32: bool = False) -> Site | None:
    """The product at ``position`` with its reader, if it is one and both may be one kernel.

    Args:
        tf32: f32 operands may be rounded.
    """
    found = product_of(graph, graph.nodes[position])
    if found is None:
        return None
    for at in graph.users[found.out.name]:
        reader = graph.nodes[at]
        if not isinstance(reader, Kernel):
            continue
        late = place(graph, position, at)
        if late is None:
            continue
        keep = found.out.name in graph.output_names or any(n != at for n in graph.users[found.out.name])
        kernel = _kernel(graph, found, reader, keep, tf32)
        if kernel is not None:
            return Site(found, position, at, kernel, late)
    return None


def product_of(graph: Graph, node: Node) -> Product | None:
    """``node`` as a product of matrices on a GPU that a kernel could make, else None."""
    if not isinstance(node, Extern) or node.op not in OPS or len(node.outs) != 1 or (out := node.outs[0]) is None:
        return None
    rank, adds = OPS[node.op]
    numbers = dict(node.kwargs)
    if out.device != "cuda" or out.dtype not in DTYPES or out.stride != contiguous_stride(out.shape):
        return None
    if set(numbers) - {"alpha", "beta"} or not all(isinstance(n, int | float) for n in numbers.values()):
        return None
    if not all(isinstance(arg, Ref) and not arg.item for arg in node.args):
        return None
    *addend, a, b = (graph.value(arg.name) for arg in node.args)
    sides = (*out.shape[-2:], a.shape[-1])
    if any(isinstance(n, int) and n < SHORTEST for n in sides) or not isinstance(a.shape[-1], int):
        return None
    if len(out.shape) != rank or {a.dtype, b.dtype} != {out.dtype} or len(addend) != adds:
        return None
    return Product(
        node, out, a, b, addend[0] if addend else None, float(numbers.get("alpha", 1)), float(numbers.get("beta", 1))
    )


def _kernel(graph: Graph, found: Product, reader: Kernel, keep: bool, tf32: bool) -> Kernel | None:
    """The kernel of both; ``keep``: others read the product too."""
    out = found.out
    domain = Domain(out.shape, (found.a.shape[-1],))
    moved = _moved(graph, found, reader, domain)
    if moved is None:
        return None
    batch, (row, column) = tuple(v for v, _ in domain.outer_axes[:-2]), (v for v, _ in domain.outer_axes[-2:])
    ((summed, _),) = domain.inner_axes
    compute = out.dtype.compute
    operands = (_load(found.a, (*batch, row, summed)), _load(found.b, (*batch, summed, column)))
    kind = "dot_tf32" if tf32 and out.dtype is DType.F32 else "dot"
    acc = Accumulator(f"{out.name}_sum", kind, operands[0], (), operands[1:])
    value: ex.Expr = ex.local(acc.name, acc.dtype)
    if found.alpha != 1:
        value = ex.op("mul", value, ex.const(found.alpha, compute))
    if found.addend is not None and found.beta != 0:
        added = ex.to(_load(found.addend, tuple(v for v, _ in domain.outer_axes)), compute)
        if found.beta != 1:
            added = ex.op("mul", added, ex.const(found.beta, compute))
        value = ex.op("add", value, added)
    body: list[Stmt] = [Fold(domain.inner_axes, (Role.SERIAL,), (acc,)), Let(out.name, ex.to(value, out.dtype))]
    if keep:
        body.append(Write(out.name, flat(domain.outer_axes), ex.local(out.name, out.dtype)))
    roots = storage_roots(graph)
    shared = {roots[v.name] for v in (found.a, found.b, out)}
    return Kernel(
        outs=(*reader.outs, *((out,) if keep else ())),
        body=(Nest(domain.outer_axes, (Role.PARALLEL,) * len(domain.outer), (*body, *moved)),),
        targets=(*(reader.targets or (None,) * len(reader.outs)), *((None,) if keep else ())),
        inplace=tuple(pair for pair in reader.inplace if roots[pair[1]] not in shared),
        origin=found.call.origin | reader.origin,
    )


def _load(value: Value, position: tuple[sympy.Expr, ...]) -> ex.Expr:
    """An element of a value that may have fewer or shorter dimensions, which then repeat."""
    flat: sympy.Expr = sympy.Integer(0)
    for var, size, step in zip(reversed(position), reversed(value.shape), reversed(value.stride), strict=False):
        if size != 1:
            flat += var * as_expr(step)
    return ex.load(value.name, (flat,), value.dtype)


def _moved(graph: Graph, found: Product, reader: Kernel, domain: Domain) -> tuple[Stmt, ...] | None:
    """The statements of an elementwise ``reader`` at a position of the product; None if it is not that."""
    nest = elementwise(reader)
    if nest is None:
        return None
    roots = storage_roots(graph)
    taken = {roots[v.name] for v in (found.out, found.a, found.b)}
    if any(roots[target] in taken for target in reader.targets if target is not None):
        return None
    if any(roots[name] == roots[found.out.name] and name != found.out.name for name in reader.operands):
        return None
    mapping = _positions(found.out.name, nest, domain)
    if mapping is None:
        return None
    ranges = dict(domain.outer_axes)
    here = flat(domain.outer_axes)

    def at(root: ex.Expr) -> ex.Expr:
        placed = tidy(ex.substitute(root, mapping), ranges)
        return ex.transform(placed, leaf)

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if isinstance(node, ex.Load) and node.buffer == found.out.name and node.index[0] == here:
            return ex.local(found.out.name, node.dtype)
        return None

    made: list[Stmt] = []
    for stmt in nest.body:
        if isinstance(stmt, Let):
            made.append(replace(stmt, expr=at(stmt.expr)))
        elif isinstance(stmt, Write):
            address = simplify(stmt.address.xreplace(mapping), ranges)
            made.append(replace(stmt, address=address, expr=at(stmt.expr)))
    if any(load.buffer == found.out.name for root in expressions(tuple(made)) for load in ex.loads(root)):
        return None
    return tuple(made)


def _positions(name: str, nest: Nest, domain: Domain) -> dict[sympy.Symbol, sympy.Expr] | None:
    """Each variable of ``nest`` by those of the product whose elements it reads one by one; None if it does not."""
    loads = {load for root in expressions((nest,)) for load in ex.loads(root) if load.buffer == name}
    addresses = {load.index[0] for load in loads}
    if len(addresses) != 1 or any(load.bind for load in loads):
        return None
    (address,) = addresses
    axes = by_memory(address, nest.axes)
    if axes is None or not _covers(axes, domain):
        return None
    return image(axes, domain.outer_axes)


def _covers(axes: tuple[Axis, ...], domain: Domain) -> bool:
    sizes: tuple[Size, Size] = product(tuple(size for _, size in axes)), product(domain.outer)
    return bool(sympy.expand(as_expr(sizes[0]) - as_expr(sizes[1])) == 0)


def _is_faster(graph: Graph, site: Site, ctx: Context) -> bool:
    """Whether the kernel is measured to take less time than the library's call and the reader."""
    assert ctx.measure is not None
    name = site.product.out.name
    apart = ctx.measure(fragment(graph, (graph.nodes[site.at], graph.nodes[site.reader])))
    together = ctx.measure(fragment(graph, (site.kernel,)))
    if apart is None or together is None:
        ctx.verdict(STAGE, name, "by the library", "no measurement")
        return False
    faster = together < WORTH * apart
    why = f"one kernel takes {together:.1f} us, the library and a kernel {apart:.1f} us"
    ctx.verdict(STAGE, name, "one kernel with its reader" if faster else "by the library", why)
    return faster


def fragment(graph: Graph, nodes: tuple[Node, ...]) -> Graph:
    """``nodes`` alone, as a graph that returns all they make."""
    made = {value.name: value for node in nodes for value in node.defs if isinstance(value, Value)}
    read = [name for node in nodes for name in node.operands if name not in made]
    sizes = tuple(item for item in graph.inputs if isinstance(item, SizeInput))
    inputs: tuple[Value | SizeInput, ...] = (*sizes, *(graph.value(name) for name in dict.fromkeys(read)))
    return Graph("fragment", inputs, nodes, tuple(Ref(name) for name in made)).check()


__all__ = ["Product", "Site", "find_site", "fragment", "product_kernels", "product_of"]
