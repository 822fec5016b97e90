"""Cutting a collective and the matrix products beside it into parts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import sympy

from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.index import FloorDiv, Mod, Ranges, flatten_index, simplify, symbol, unflatten
from dcompile.ir.nodes import Axis, Extern, Node, Pack, Pointwise, Ref, View
from dcompile.ir.types import Origin, Size, Value, contiguous_stride
from dcompile.schedule.product_sites import PRODUCTS, ROW, WHO, Site
from dcompile.schedule.simplify import without_dead


def cut(graph: Graph, sites: list[Site], parts: int) -> Graph:
    """``graph`` with every one of ``sites`` in ``parts`` parts, where its rows can be divided so."""
    edit = _Edit(graph, parts)
    for site in sites:
        start = graph.nodes[site.start]
        if isinstance(start, Start) and edit.fits(site):
            (edit.gather if start.kind is Kind.ALL_GATHER else edit.scatter)(site)
    return without_dead(edit.result()).check() if edit.instead else graph


@dataclass
class _Edit:
    """Nodes that take the place of others, by position."""

    graph: Graph
    parts: int
    instead: dict[int, list[Node]] = field(default_factory=dict)

    def result(self) -> Graph:
        nodes = [new for at, node in enumerate(self.graph.nodes) for new in self.instead.get(at, [node])]
        return self.graph.with_nodes(tuple(nodes))

    def fits(self, site: Site) -> bool:
        """Whether the rows can be divided."""
        start = self._start(site)
        shared = start.sources[0] if start.kind is Kind.ALL_GATHER else start.pending.results[0].name
        rows = int(self.graph.value(shared).shape[0])
        blocks = site.moved is not None or site.steps is not None
        for at in site.products:
            product = self._product(at)
            extent = int(self._factor(product).shape[0])
            if not blocks and (product.op == "aten.bmm.default" or extent % (rows * start.group.size)):
                return False
            if blocks and extent % rows and rows % extent:
                return False
            if extent % self.parts:
                return False
        return rows % self.parts == 0

    def gather(self, site: Site) -> None:
        """Every product begins when a part of its first factor is there."""
        start, count = self._start(site), self.parts
        source, gathered = self.graph.value(start.sources[0]), start.pending.results[0]
        pieces = [self._rows(source, n, start) for n in range(count)]
        arrived = [_cut(gathered, n, count, "arrived") for n in range(count)]
        launches = [_launch(start, piece.out.name, result) for piece, result in zip(pieces, arrived, strict=True)]
        self.instead[site.start] = [*pieces, *launches]
        self.instead[site.wait] = []
        whole = gathered if site.moved is None else self.graph.nodes[site.moved].defs[0]
        assert isinstance(whole, Value)
        lands: list[list[Node]] = [[_landing(launch, start)] for launch in launches]
        factors = arrived
        if site.moved is not None:
            copies = [self._moved(site, n, arrived[n], start) for n in range(count)]
            lands = [[*land, copy] for land, copy in zip(lands, copies, strict=True)]
            factors = [copy.out for copy in copies]
            self.instead[site.moved] = []
        together = self._together(whole, factors, start.origin, start.group.size if site.moved is None else 1)
        first = self._first_reader(site, whole)
        if site.moved is not None and len(self.graph.users[gathered.name]) > 1:
            first = site.wait
            together += self._together(gathered, arrived, start.origin, start.group.size)
        if first == site.products[0]:
            self._multiply(site, first, factors, lands, together)
        else:
            self.instead[first] = [node for land in lands for node in land] + together
        for at in site.products:
            if at not in self.instead:
                self._multiply(site, at, factors, [[] for _ in lands], [])

    def scatter(self, site: Site) -> None:
        """Every part of the last product is reduced while the next is computed."""
        start, last = self._start(site), site.products[-1]
        source, result = self.graph.value(start.sources[0]), start.pending.results[0]
        made: dict[int, list[list[Node]]] = {at: self._parts(site, at) for at in site.products}
        outs = {at: [self._out(part[-1]) for part in made[at]] for at in site.products}
        reduced = [_cut(result, n, self.parts, "reduced") for n in range(self.parts)]
        launches: list[Start] = []
        for n in range(self.parts):
            sent = self._sent(site, n, source, [outs[at][n] for at in site.products], start)
            launches.append(_launch(start, sent.out.name, reduced[n]))
            made[last][n] += [sent, launches[-1]]
        ranks = start.group.size if site.steps is None else 1
        for at in site.products:
            product = self._product(at)
            together = self._together(self._out(product), outs[at], product.origin, ranks)
            self.instead[at] = [*(node for part in made[at] for node in part), *together]
        self.instead[site.start] = []
        whole = self._together(result, reduced, start.origin, 1)
        self.instead[site.wait] = [*(_landing(launch, start) for launch in launches), *whole]

    def _parts(self, site: Site, at: int) -> list[list[Node]]:
        """The parts of a product that is reduced, each with what it needs in front."""
        product, blocks = self._product(at), site.steps is not None
        made: list[list[Node]] = []
        for n in range(self.parts):
            factor = self._block(product, n, 1 if blocks else self._start(site).group.size)
            made.append([factor, *self._part(product, n, factor.out, blocks)])
        return made

    def _start(self, site: Site) -> Start:
        start = self.graph.nodes[site.start]
        assert isinstance(start, Start)
        return start

    def _product(self, at: int) -> Extern:
        product = self.graph.nodes[at]
        assert isinstance(product, Extern)
        return product

    def _out(self, product: Node) -> Value:
        out = product.defs[0]
        assert isinstance(out, Value)
        return out

    def _factor(self, product: Extern) -> Value:
        return self.graph.value(product.args[PRODUCTS[product.op]].name)

    def _first_reader(self, site: Site, whole: Value) -> int:
        """Where all of ``whole`` is needed first: the first product, or what comes before it and is no product."""
        found = set(site.products)
        for at in self.graph.users[whole.name]:
            node = self.graph.nodes[at]
            readers = self.graph.users[node.out.name] if isinstance(node, View) else (at,)
            returned = isinstance(node, View) and node.out.name in self.graph.output_names
            if returned or not set(readers) <= set(site.products):
                found.add(at)
        return min(found) if min(found) in site.products else (site.wait if site.moved is None else site.moved)

    def _rows(self, value: Value, n: int, like: Node) -> View:
        """Part ``n`` of ``value`` along its first dimension, in place."""
        per = value.shape[0] // self.parts
        out = replace(value, name=f"{value.name}_{self._tag(like)}part{n}", shape=(per, *value.shape[1:]))
        axes = _axes(out.shape)
        index = (axes[0][0] + n * per, *(var for var, _ in axes[1:]))
        return View(out=out, base=value.name, axes=axes, index=index, origin=like.origin)

    def _tag(self, like: Node) -> str:
        """Parts of one value may be taken for several readers."""
        return f"{like.defs[0].name}_"

    def _moved(self, site: Site, n: int, arrived: Value, start: Start) -> Pointwise:
        """The copy behind the gather, of part ``n``: the same rows of every rank."""
        copy = self.graph.nodes[site.moved or 0]
        assert isinstance(copy, Pointwise)
        assert isinstance(copy.expr, ex.Load)
        rows = int(self.graph.value(start.sources[0]).shape[0])
        ranges = dict(copy.axes)
        who = simplify(FloorDiv(copy.expr.index[0], sympy.Integer(rows)), ranges)
        first = copy.axes[0][0]
        out = _cut(copy.out, n, self.parts, "part")
        axes = ((first, rows // self.parts), *copy.axes[1:])
        index = (who * (rows // self.parts) + first, *copy.expr.index[1:])
        return replace(copy, out=out, axes=axes, expr=ex.load(arrived.name, index, copy.expr.dtype))

    def _multiply(
        self, site: Site, at: int, factors: list[Value], lands: list[list[Node]], together: list[Node]
    ) -> None:
        product, made = self._product(at), []
        outs: list[Value] = []
        for n, (factor, land) in enumerate(zip(factors, lands, strict=True)):
            shape = (self._factor(product).shape[0] // self.parts, *self._factor(product).shape[1:])
            seen = _seen_as(factor, f"{self._out(product).name}_factor{n}", shape, product)
            call = self._part(product, n, seen.out, site.moved is not None)
            outs.append(self._out(call[-1]))
            made += [*land, seen, *call]
        ranks = self._start(site).group.size if site.moved is None else 1
        self.instead[at] = [*made, *together, *self._together(self._out(product), outs, product.origin, ranks)]

    def _part(self, product: Extern, n: int, factor: Value, blocks: bool) -> list[Node]:
        """Part ``n`` of a product, and before it the part of the second factor where that has a batch, too."""
        at = PRODUCTS[product.op]
        args = [*product.args]
        args[at] = Ref(factor.name)
        before: list[Node] = []
        if product.op == "aten.bmm.default" and blocks:
            second = self._rows(self.graph.value(args[1].name), n, product)
            args[1], before = Ref(second.out.name), [second]
        out = _cut(self._out(product), n, self.parts, "part")
        return [*before, replace(product, outs=(out,), args=tuple(args))]

    def _block(self, product: Extern, n: int, ranks: int) -> View | Pointwise:
        """The rows of the first factor that part ``n`` needs: a block, or a block of each rank's rows."""
        factor = self._factor(product)
        if ranks == 1:
            return self._rows(factor, n, product)
        rows = int(factor.shape[0]) // ranks
        per = rows // self.parts
        shape = (ranks * per, *factor.shape[1:])
        out = Value(
            f"{self._out(product).name}_factor{n}", factor.dtype, shape, contiguous_stride(shape), factor.device
        )
        axes = _axes(shape)
        row = axes[0][0]
        index = (
            FloorDiv(row, sympy.Integer(per)) * rows + n * per + Mod(row, sympy.Integer(per)),
            *_variables(axes)[1:],
        )
        return Pointwise(out=out, axes=axes, expr=ex.load(factor.name, index, factor.dtype), origin=product.origin)

    def _sent(self, site: Site, n: int, source: Value, parts: list[Value], start: Start) -> View | Pointwise:
        """What part ``n`` of the reduction sends. ``parts``: of the products, in the order of ``site.products``."""
        name = f"{start.pending.name}_sent{n}"
        shape = (source.shape[0] // self.parts, *source.shape[1:])
        if site.steps is None and site.combined is None:
            return _seen_as(parts[0], name, shape, start)
        out = Value(name, source.dtype, shape, contiguous_stride(shape), source.device)
        axes = _axes(shape)
        ranges = dict(axes)
        per = int(shape[0]) // start.group.size
        row = axes[0][0]
        place = {WHO: FloorDiv(row, sympy.Integer(per)), ROW: Mod(row, sympy.Integer(per))}
        if site.steps is None:
            index = _elsewhere(_variables(axes), shape, tuple(parts[0].shape), ranges)
        else:
            flat = simplify(site.steps.xreplace(place), ranges)
            index = tuple(simplify(at, ranges) for at in unflatten(flat, parts[0].shape))
        names = {self._out(self._product(at)).name: part for at, part in zip(site.products, parts, strict=True)}

        def element(item: ex.Expr) -> ex.Expr | None:
            return ex.load(names[item.buffer].name, index, item.dtype) if isinstance(item, ex.Load) else None

        whole = site.combined or ex.load(next(iter(names)), (), parts[0].dtype)
        return Pointwise(out=out, axes=axes, expr=ex.transform(whole, element), origin=start.origin)

    def _together(self, whole: Value, parts: list[Value], origin: Origin, ranks: int) -> list[Node]:
        """``whole`` from its parts, which lie side by side in it, or hold a block of each rank's rows each."""
        flat = Value(f"{whole.name}_parts", whole.dtype, (whole.numel,), (1,), whole.device)
        pack = Pack(out=flat, parts=tuple(part.name for part in parts), origin=origin)
        axes = _axes(whole.shape)
        place = flatten_index(_variables(axes), contiguous_stride(whole.shape))
        if ranks == 1:
            return [pack, View(out=whole, base=flat.name, axes=axes, index=(place,), origin=origin)]
        rows = int(whole.shape[0]) // ranks
        per = rows // self.parts
        row, each = axes[0][0], int(whole.numel) // int(whole.shape[0])
        who, mine = FloorDiv(row, sympy.Integer(rows)), Mod(row, sympy.Integer(rows))
        part, inside = FloorDiv(mine, sympy.Integer(per)), Mod(row, sympy.Integer(per))
        there = simplify(place - row * each + ((part * ranks + who) * per + inside) * each, dict(axes))
        return [pack, Pointwise(out=whole, axes=axes, expr=ex.load(flat.name, (there,), whole.dtype), origin=origin)]


def _axes(shape: tuple[Size, ...]) -> tuple[Axis, ...]:
    return tuple((symbol(f"i{n}"), size) for n, size in enumerate(shape))


def _variables(axes: tuple[Axis, ...]) -> tuple[sympy.Symbol, ...]:
    return tuple(var for var, _ in axes)


def _cut(whole: Value, n: int, parts: int, what: str) -> Value:
    """Part ``n`` of ``whole`` along its first dimension, in memory of its own."""
    shape = (whole.shape[0] // parts, *whole.shape[1:])
    return Value(f"{whole.name}_{what}{n}", whole.dtype, shape, contiguous_stride(shape), whole.device)


def _seen_as(value: Value, name: str, shape: tuple[Size, ...], like: Node) -> View:
    """``value``, row-major, in another shape."""
    out = Value(name, value.dtype, shape, contiguous_stride(shape), value.device)
    axes = _axes(shape)
    index = _elsewhere(_variables(axes), tuple(shape), tuple(value.shape), dict(axes))
    return View(out=out, base=value.name, axes=axes, index=index, origin=like.origin)


def _elsewhere(
    at: tuple[sympy.Expr, ...], shape: tuple[Size, ...], other: tuple[Size, ...], ranges: Ranges
) -> tuple[sympy.Expr, ...]:
    """The position in shape ``other`` of the element at ``at`` in ``shape``, both row-major. Last dimensions that are
    equal are mapped by themselves, which keeps the expressions short."""
    if len(shape) > 1 and len(other) > 1 and shape[-1] == other[-1]:
        return (*_elsewhere(at[:-1], shape[:-1], other[:-1], ranges), at[-1])
    flat = flatten_index(at, contiguous_stride(shape))
    return tuple(simplify(entry, ranges) for entry in unflatten(flat, other))


def _launch(start: Start, source: str, result: Value) -> Start:
    pending = Pending(f"{result.name}_flight", (result,), in_place=False)
    return replace(start, pending=pending, sources=(source,))


def _landing(launch: Start, start: Start) -> Wait:
    return Wait(outs=launch.pending.results, pending=launch.pending.name, origin=start.origin)
