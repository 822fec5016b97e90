"""Random small programs for property tests of every stage: valid LOOPS graphs and inputs for N ranks.

All ranks run the same graph. Programs are well conditioned (bounded, continuous functions), so that a correct rewrite
changes results by rounding only. Storage is tracked, so that mutation and collectives obey the rules: a mutated storage
is read through its newest version only, nothing writes a source in flight, nothing touches a result in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy
from hypothesis import strategies as st

from dcompile.collectives.group import Group
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.collectives.rules import RULES, result_value
from dcompile.ir import expr as ex
from dcompile.ir.combine import neutral, rule
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import as_expr, as_size, flatten_index, product, symbol, unflatten
from dcompile.ir.nodes import Axis, Extern, Node, Pack, Pointwise, Reduction, Ref, Scan, Store, View
from dcompile.ir.types import DType, Origin, Size, Value, contiguous_stride
from tests.inputs import assert_same, copy_inputs, random_inputs

GROUP = Group("g0", 2)
SIZE = symbol("s0")
SIZE_HINT = 4
DIMENSIONS = (1, 2, 3, 4)
F32, I64 = DType.F32, DType.I64
_UNARY = ("neg", "abs", "tanh", "sigmoid", "sin", "cos")
_BINARY = ("add", "sub", "maximum", "minimum")


def contiguous(name: str, shape: tuple[Size, ...], dtype: DType = F32) -> Value:
    return Value(name, dtype, shape, contiguous_stride(shape))


@dataclass
class _Entry:
    """A readable value and the storage it lives in."""

    value: Value
    storage: str
    is_view: bool = False


@dataclass
class _Flight:
    start: Start
    sources: frozenset[str]
    """Storages of the sources."""


@dataclass
class _Builder:
    draw: Callable[[st.SearchStrategy[object]], object]
    inputs: list[Value | SizeInput] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)
    flights: list[_Flight] = field(default_factory=list)
    count: int = 0

    def pick(self, items: Sequence[object]) -> object:
        return self.draw(st.sampled_from(items))

    def chance(self) -> bool:
        return bool(self.draw(st.booleans()))

    def name(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def origin(self, op: str) -> Origin:
        return Origin((f"aten.{op}.default",), f"model.py:{self.count}")

    def add_input(self, value: Value) -> None:
        self.inputs.append(value)
        self.entries.append(_Entry(value, value.name))

    def emit(self, node: Node, value: Value, storage: str | None = None, is_view: bool = False) -> None:
        self.nodes.append(node)
        self.entries.append(_Entry(value, storage or value.name, is_view))

    def readable(self, ok: Callable[[Value], bool] = lambda value: True) -> list[_Entry]:
        return [e for e in self.entries if e.value.dtype is F32 and ok(e.value)]

    def writable(self) -> list[_Entry]:
        """Values that may be overwritten: they own their storage, and it is not a source in flight."""
        busy = frozenset().union(*(f.sources for f in self.flights))
        return [e for e in self.readable() if not e.is_view and e.storage not in busy and _is_dense(e.value)]

    def retire(self, storage: str) -> None:
        """No value of this storage is read any more under its present name."""
        self.entries = [e for e in self.entries if e.storage != storage]


def _is_dense(value: Value) -> bool:
    return value.stride == contiguous_stride(value.shape)


def _axes(shape: tuple[Size, ...], prefix: str = "i") -> tuple[Axis, ...]:
    return tuple((symbol(f"{prefix}{n}"), size) for n, size in enumerate(shape))


def _broadcasts(shape: tuple[Size, ...], onto: tuple[Size, ...]) -> bool:
    if len(shape) > len(onto):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(onto), strict=False))


def _leaf(b: _Builder, shape: tuple[Size, ...], index: tuple[sympy.Expr, ...]) -> ex.Expr:
    """Something to read at ``index`` of a loop over ``shape``: a buffer, a constant, a table row, a padded buffer."""
    kind = b.pick(("load", "load", "load", "const", "index", "gather", "padded"))
    if kind == "const":
        return ex.const(float(b.pick((-1.5, 0.25, 0.5, 2.0))), F32)
    if kind == "index" and index:
        return ex.op("mul", ex.to(ex.index(index[-1]), F32), ex.const(0.125, F32))
    tables = b.readable(lambda v: len(v.shape) == 1 and isinstance(v.shape[0], int))
    counters = [e.value for e in b.entries if e.value.dtype is I64 and _broadcasts(e.value.shape, shape)]
    if kind == "gather" and tables and counters:
        table, counter = b.pick(tables).value, b.pick(counters)
        at = ex.load(counter.name, _positions(counter.shape, index), I64)
        row = ex.op("wrap_index", ex.op("mod", at, ex.const(table.shape[0], I64)), ex.const(table.shape[0], I64))
        return ex.load(table.name, (ex.bound(0),), F32, (row,))
    fitting = b.readable(lambda v: _broadcasts(v.shape, shape))
    if not fitting:
        return ex.const(0.75, F32)
    value = b.pick(fitting).value
    where = _positions(value.shape, index)
    if kind == "padded" and value.shape and isinstance(value.shape[-1], int) and value.shape[-1] > 1:
        inside = ex.op("lt", ex.index(where[-1] + 1), ex.const(value.shape[-1], I64))
        shifted = ex.load(value.name, (*where[:-1], where[-1] + 1), F32)
        return ex.masked(inside, shifted, ex.const(0.5, F32))
    return ex.load(value.name, where, F32)


def _positions(shape: tuple[Size, ...], index: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
    """``index`` broadcast to a buffer of ``shape``."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if size == 1 else i for i, size in zip(tail, shape, strict=True))


def _expr(b: _Builder, shape: tuple[Size, ...], index: tuple[sympy.Expr, ...]) -> ex.Expr:
    pool = [_leaf(b, shape, index) for _ in range(b.draw(st.integers(1, 3)))]
    for _ in range(b.draw(st.integers(0, 3))):
        x, y = b.pick(pool), b.pick(pool)
        kind = b.pick(("unary", "binary", "leaky", "product"))
        if kind == "unary":
            pool.append(ex.op(b.pick(_UNARY), x))
        elif kind == "binary":
            pool.append(ex.op(b.pick(_BINARY), x, y))
        elif kind == "product":
            pool.append(ex.op("mul", ex.op("tanh", x), y))
        else:
            positive = ex.op("gt", x, ex.const(0.0, F32))
            pool.append(ex.op("where", positive, x, ex.op("mul", x, ex.const(0.125, F32))))
    return pool[-1]


def _pointwise(b: _Builder) -> bool:
    shape = b.pick(b.readable()).value.shape
    axes = _axes(shape)
    out = contiguous(b.name(), shape)
    expr = _expr(b, shape, tuple(v for v, _ in axes))
    b.emit(Pointwise(out=out, axes=axes, expr=expr, origin=b.origin("add")), out)
    return True


def _reduction(b: _Builder) -> bool:
    found = b.readable(lambda v: len(v.shape) > 0)
    if not found:
        return False
    shape = b.pick(found).value.shape
    reduced = b.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    kept = [d for d in range(len(shape)) if d not in reduced]
    axes = tuple((symbol(f"i{n}"), shape[d]) for n, d in enumerate(kept))
    raxes = tuple((symbol(f"r{n}"), shape[d]) for n, d in enumerate(sorted(reduced)))
    by_dim = dict(zip(kept, (v for v, _ in axes), strict=True)) | dict(
        zip(sorted(reduced), (v for v, _ in raxes), strict=True)
    )
    expr = _expr(b, shape, tuple(by_dim[d] for d in range(len(shape))))
    out = contiguous(b.name(), tuple(n for _, n in axes))
    kind = b.pick(("sum", "max", "min"))
    b.emit(Reduction(out=out, kind=kind, axes=axes, raxes=raxes, expr=expr, origin=b.origin(kind)), out)
    return True


def _moments(b: _Builder) -> bool:
    found = b.readable(lambda v: len(v.shape) > 0)
    if not found:
        return False
    shape = b.pick(found).value.shape
    axes = _axes(shape[:-1])
    raxes = ((symbol("r0"), shape[-1]),)
    expr = _expr(b, shape, tuple(v for v, _ in (*axes, *raxes)))
    out, *more = (contiguous(b.name(), shape[:-1]) for _ in range(3))
    node = Reduction(
        out=out, more=tuple(more), kind="welford", axes=axes, raxes=raxes, expr=expr, origin=b.origin("var_mean")
    )
    b.emit(node, out)
    b.entries += [_Entry(value, value.name) for value in more]
    return True


def _scan(b: _Builder) -> bool:
    found = b.readable(lambda v: len(v.shape) > 0)
    if not found:
        return False
    shape = b.pick(found).value.shape
    axes = _axes(shape)
    along = axes[b.draw(st.integers(0, len(shape) - 1))][0]
    kind = b.pick(("sum", "max"))
    out = contiguous(b.name(), shape)
    expr = _expr(b, shape, tuple(v for v, _ in axes))
    start = neutral(kind, F32) if b.chance() else ()
    node = Scan(
        outs=(out,), axes=axes, along=along, exprs=(expr,), combine=rule(kind, F32), start=start, origin=b.origin(kind)
    )
    b.emit(node, out)
    return True


def _view(b: _Builder) -> bool:
    entry = b.pick(b.readable())
    base = entry.value
    shape, stride, index = _VIEWS[b.pick(tuple(_VIEWS))](b, base)
    out = Value(b.name(), F32, shape, stride)
    node = View(out=out, base=base.name, axes=_axes(shape), index=index, origin=b.origin("view"))
    b.emit(node, out, entry.storage, is_view=True)
    return True


_Map = tuple[tuple[Size, ...], tuple[Size, ...], tuple[sympy.Expr, ...]]


def _permute(b: _Builder, base: Value) -> _Map:
    order = b.draw(st.permutations(range(len(base.shape))))
    index = tuple(symbol(f"i{list(order).index(d)}") for d in range(len(base.shape)))
    return tuple(base.shape[d] for d in order), tuple(base.stride[d] for d in order), index


def _slice(b: _Builder, base: Value) -> _Map:
    shape, index = list(base.shape), [symbol(f"i{d}") for d in range(len(base.shape))]
    for d, size in enumerate(base.shape):
        if isinstance(size, int) and size > 1 and b.chance():
            shape[d], index[d] = size - 1, index[d] + 1
    return tuple(shape), base.stride, tuple(index)


def _expand(b: _Builder, base: Value) -> _Map:
    extra = b.pick((2, 3))
    shape = (extra, *base.shape)
    return shape, (0, *base.stride), tuple(symbol(f"i{d + 1}") for d in range(len(base.shape)))


def _flatten(b: _Builder, base: Value) -> _Map:
    """A reshape to one dimension; eager copies where the base is not contiguous."""
    total = product(base.shape)
    return (total,), (1,), unflatten(symbol("i0"), base.shape) if base.shape else ()


def _split(b: _Builder, base: Value) -> _Map:
    """A reshape that splits dimension 0 in two."""
    if not base.shape or not isinstance(base.shape[0], int) or base.shape[0] % 2 or not _is_dense(base):
        return _flatten(b, base)
    shape = (2, base.shape[0] // 2, *base.shape[1:])
    flat = flatten_index((symbol("i0"), symbol("i1")), (shape[1], 1))
    rest = tuple(symbol(f"i{d + 1}") for d in range(1, len(base.shape)))
    return shape, contiguous_stride(shape), (flat, *rest)


_VIEWS: dict[str, Callable[[_Builder, Value], _Map]] = {
    "permute": _permute, "slice": _slice, "expand": _expand, "flatten": _flatten, "split": _split,
}  # fmt: skip


def _store(b: _Builder) -> bool:
    found = [e for e in b.writable() if e.value.shape]
    if not found:
        return False
    entry = b.pick(found)
    target = entry.value
    inner = tuple(n - 1 if isinstance(n, int) and n > 1 and b.chance() else n for n in target.shape)
    axes = _axes(inner)
    index = tuple(v + (0 if n == m else 1) for (v, n), m in zip(axes, target.shape, strict=True))
    expr, bind, mode = _expr(b, inner, tuple(v for v, _ in axes)), (), b.pick(("set", "add"))
    rows = [e.value for e in b.entries if e.value.dtype is I64 and _broadcasts(e.value.shape, inner)]
    if mode == "add" and rows and isinstance(target.shape[0], int) and b.chance():
        row = b.pick(rows)
        at = ex.load(row.name, _positions(row.shape, tuple(v for v, _ in axes)), I64)
        bind, index = (ex.op("mod", at, ex.const(target.shape[0], I64)),), (ex.bound(0), *index[1:])
    out = Value(b.name(), F32, target.shape, target.stride)
    node = Store(
        out=out, target=target.name, axes=axes, index=index, expr=expr, bind=bind, mode=mode, origin=b.origin("copy_")
    )
    b.retire(entry.storage)
    b.emit(node, out, entry.storage)
    return True


def _mm(b: _Builder) -> bool:
    matrices = b.readable(lambda v: len(v.shape) == 2)
    pairs = [(x, y) for x in matrices for y in matrices if x.value.shape[1] == y.value.shape[0]]
    if not pairs:
        return False
    x, y = (entry.value for entry in b.pick(pairs))
    out = contiguous(b.name(), (x.shape[0], y.shape[1]))
    args = (Ref(x.name), Ref(y.name))
    b.emit(Extern(outs=(out,), op="aten.mm.default", args=args, out_op="aten.mm.out", origin=b.origin("mm")), out)
    return True


def _relu(b: _Builder) -> bool:
    if not (found := b.readable(_is_dense)):
        return False
    x = b.pick(found).value
    out = contiguous(b.name(), x.shape)
    b.emit(Extern(outs=(out,), op="aten.relu.default", args=(Ref(x.name),), origin=b.origin("relu")), out)
    return True


def _mutating_extern(b: _Builder) -> bool:
    if not (found := b.writable()):
        return False
    entry = b.pick(found)
    x = entry.value
    version = Value(b.name(), F32, x.shape, x.stride)
    node = Extern(
        outs=(), op="aten.mul_.Tensor", args=(Ref(x.name), 0.5), writes=(x.name,), versions=(version,),
        origin=b.origin("mul_"),
    )  # fmt: skip
    b.retire(entry.storage)
    b.emit(node, version, entry.storage)
    return True


def _pack(b: _Builder) -> bool:
    parts = [b.pick(b.readable()).value for _ in range(b.draw(st.integers(1, 3)))]
    total: Size = sum((as_expr(p.numel) for p in parts), sympy.Integer(0))
    out = contiguous(b.name(), (as_size(total),))
    b.emit(Pack(out=out, parts=tuple(p.name for p in parts), origin=b.origin("cat")), out)
    return True


def _start(b: _Builder) -> bool:
    kind = b.pick(tuple(Kind))
    rule = RULES[kind]
    in_place = rule.in_place and b.chance()
    pool = b.writable() if in_place else b.readable(_is_dense)
    pool = [e for e in pool if not rule.divides or _has_even_rows(e.value)]
    count = min(b.draw(st.integers(1, 2)), len({e.storage for e in pool}))
    chosen: dict[str, _Entry] = {}
    for _ in range(count):
        entry = b.pick([e for e in pool if e.storage not in chosen])
        chosen[entry.storage] = entry
    if not chosen:
        return False
    sources = tuple(e.value for e in chosen.values())
    results = tuple(result_value(kind, b.name("r"), source, GROUP.size) for source in sources)
    start = Start(
        pending=Pending(b.name("p"), results, in_place), kind=kind, group=GROUP,
        sources=tuple(s.name for s in sources), reduction=b.pick(("sum", "avg", "max")) if rule.reduces else None,
        root=b.pick((0, 1)) if rule.rooted else None, origin=b.origin(kind.value),
    )  # fmt: skip
    b.nodes.append(start)
    b.flights.append(_Flight(start, frozenset(chosen)))
    if in_place:
        for storage in chosen:
            b.retire(storage)
    return True


def _has_even_rows(value: Value) -> bool:
    return bool(value.shape) and isinstance(value.shape[0], int) and value.shape[0] % GROUP.size == 0


def _wait(b: _Builder) -> bool:
    if not b.flights:
        return False
    flight = b.flights.pop(b.draw(st.integers(0, len(b.flights) - 1)))
    pending = flight.start.pending
    b.nodes.append(Wait(outs=pending.results, pending=pending.name, origin=b.origin("wait")))
    storages = list(flight.sources)
    by_source = dict(zip(flight.start.sources, pending.results, strict=True))
    for source, result in by_source.items():
        storage = _storage_of(b, source, storages) if pending.in_place else result.name
        b.entries.append(_Entry(result, storage))
    return True


def _storage_of(b: _Builder, name: str, candidates: list[str]) -> str:
    """The storage a mutated name lives in, found by following versions back to their first name."""
    before: dict[str, str] = {}
    for node in b.nodes:
        if isinstance(node, Store):
            before[node.out.name] = node.target
        elif isinstance(node, Extern):
            before.update({v.name: w for w, v in zip(node.writes, node.versions, strict=True)})
        elif isinstance(node, Start) and node.pending.in_place:
            before.update({r.name: s for s, r in zip(node.sources, node.pending.results, strict=True)})
    while name in before:
        name = before[name]
    assert name in candidates, f"{name} is not the storage of a source"
    return name


_PLAIN = (_pointwise, _pointwise, _pointwise, _reduction, _view, _view, _mm, _relu, _pack, _moments, _scan)
_MUTATING = (_store, _store, _mutating_extern)
_COMMUNICATING = (_start, _start, _wait)


@st.composite
def graphs(
    draw: Callable[[st.SearchStrategy[object]], object],
    max_nodes: int = 10,
    collectives: bool = True,
    mutations: bool = True,
    symbolic: bool = False,
) -> Graph:
    """Valid LOOPS graphs for ``GROUP.size`` ranks.

    Args:
        max_nodes: most nodes, the waits that end the program not counted.
        collectives: contains Start and Wait over ``GROUP``.
        mutations: contains Store and Extern nodes that write, and in-place collectives where ``collectives``.
        symbolic: input ``s0`` is a size; some tensors have it as a dimension.
    """
    b = _Builder(draw)
    sizes: tuple[Size, ...] = (*DIMENSIONS, SIZE, SIZE) if symbolic else DIMENSIONS
    if symbolic:
        b.inputs.append(SizeInput(SIZE, SIZE_HINT))
    for _ in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.sampled_from(sizes), max_size=3)))
        b.add_input(contiguous(b.name("x"), shape))
    rows = b.pick((1, 2, 4))
    b.add_input(contiguous(b.name("x"), (rows, rows)))
    b.inputs.append(contiguous("positions", (draw(st.sampled_from(DIMENSIONS)),), I64))
    b.entries.append(_Entry(b.inputs[-1], "positions"))
    kinds = _PLAIN + (_MUTATING if mutations else ()) + (_COMMUNICATING if collectives else ())
    for _ in range(draw(st.integers(1, max_nodes))):
        if not b.readable():
            _wait(b)  # everything is in flight in place
        if not draw(st.sampled_from(kinds))(b):
            _pointwise(b) if b.readable() else _wait(b)
    while b.flights:
        _wait(b)
    outputs = draw(st.lists(st.sampled_from([e.value.name for e in b.entries]), min_size=1, max_size=4))
    return Graph("forward", tuple(b.inputs), tuple(b.nodes), tuple(Ref(name) for name in outputs)).check()


__all__ = ["GROUP", "SIZE", "SIZE_HINT", "assert_same", "contiguous", "copy_inputs", "graphs", "random_inputs"]
