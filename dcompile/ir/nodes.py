"""The nodes of a graph before fusion. Frozen; a node names its operands and defines values.

Grammar (``ir.text`` prints and parses it)::

    node = value = pointwise (axes) expr                        # out[axes] = expr
         | value... = reduce kind (axes; raxes) expr...         # out[axes] = fold kind over raxes of expr
         | value... = scan (axes) along axis by ... of expr...  # out[axes] = fold of everything up to here
         | value = view base (axes) -> (index)                  # out[axes] is base[index], the same storage or a copy
         | value = store mode target (axes) [index] = expr      # target[index] = or += expr; value is target afterwards
         | value = pack parts                                   # one flat buffer, the parts side by side
         | value... = extern op(args) {mutates}                 # a library call

Dependences are by storage and program order: a node that mutates names the operand it writes and defines the operand's
next version; everything later in the program reads the new version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import sympy

from dcompile.ir import expr as ex
from dcompile.ir.types import Def, Number, Origin, Size, Value

Axis: TypeAlias = tuple[sympy.Symbol, Size]
"""A loop variable and its extent."""


@dataclass(frozen=True)
class Ref:
    """A tensor operand inside the arguments of a library call, or an output of a graph; ``item``: the number in it."""

    name: str
    item: bool = False


@dataclass(frozen=True)
class Literal:
    """A non-numeric argument of a library call: ``Literal("dtype", "f32")``, ``Literal("device", "cpu")``,
    ``Literal("memory_format", "contiguous_format")``, ``Literal("layout", "strided")``, ``Literal("complex", "1j")``;
    ``Literal("graph", name)`` for one of ``Graph.graphs``, ``Literal("module", name)`` for a program that only the
    library can run, ``Literal("dict", keys)`` before the values of a dictionary."""

    kind: str
    value: str


Arg: TypeAlias = Any
"""Argument of a library call: Ref | Literal | None | bool | int | float | str | sympy.Expr | tuple of Arg."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Base of all nodes, those of ``collectives`` included."""

    origin: Origin = field(default=Origin(), compare=False)

    @property
    def defs(self) -> tuple[Def, ...]:
        """What the node defines."""
        raise AttributeError(f"{type(self).__name__} does not say what it defines")

    @property
    def operands(self) -> tuple[str, ...]:
        """Names the node reads, without repeats, in a fixed order."""
        raise AttributeError(f"{type(self).__name__} does not say what it reads")

    @property
    def mutates(self) -> tuple[str, ...]:
        """Those operands whose storage the node writes."""
        return ()

    @property
    def has_effect(self) -> bool:
        """Whether the node stays although nobody reads what it defines."""
        return False

    @property
    def extra_sizes(self) -> tuple[Size, ...]:
        """Sizes the node uses beside those of what it defines, its axes, indices and arguments."""
        return ()

    def rename(self, names: dict[str, str]) -> Node:
        """The same node reading other names (definitions keep theirs)."""
        raise AttributeError(f"{type(self).__name__} cannot be renamed")


N = TypeVar("N", bound=Node)


@dataclass(frozen=True, kw_only=True)
class Pointwise(Node):
    """``out[axes] = expr``; one axis per dimension of ``out``."""

    out: Value
    axes: tuple[Axis, ...]
    expr: ex.Expr

    @property
    def defs(self) -> tuple[Value, ...]:
        return (self.out,)

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        return _buffers(self.expr)

    @property
    def exprs(self) -> tuple[ex.Expr, ...]:
        return (self.expr,)

    def map(self, change: Callable[[ex.Expr], ex.Expr]) -> Pointwise:
        """The same loop of a changed expression."""
        return replace(self, expr=change(self.expr))

    def rename(self, names: dict[str, str]) -> Pointwise:
        return self.map(lambda e: rename_loads(e, names))


@dataclass(frozen=True, kw_only=True)
class Reduction(Node):
    """``out[axes] = fold(kind, expr over raxes)``. ``expr`` has the accumulation dtype; ``out`` may be narrower.

    ``kind`` is one of ``ops.REDUCTIONS``. An empty ``raxes`` extent gives the neutral element.

    Attributes:
        more: further results of a kind that has several (``ops.WELFORD``: M2 and weight beside the mean), with the
            shape and strides of ``out``.
        others: further operands of a kind that takes several (``welford_merge``: M2 and weight), of the dtype of
            ``expr``.
    """

    out: Value
    kind: str
    axes: tuple[Axis, ...]
    raxes: tuple[Axis, ...]
    expr: ex.Expr
    more: tuple[Value, ...] = ()
    others: tuple[ex.Expr, ...] = ()

    @property
    def defs(self) -> tuple[Value, ...]:
        return (self.out, *self.more)

    @property
    def exprs(self) -> tuple[ex.Expr, ...]:
        """Everything that enters, ``expr`` first."""
        return (self.expr, *self.others)

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        return _buffers(*self.exprs)

    def map(self, change: Callable[[ex.Expr], ex.Expr]) -> Reduction:
        """The same reduction of changed expressions."""
        return replace(self, expr=change(self.expr), others=tuple(change(e) for e in self.others))

    def rename(self, names: dict[str, str]) -> Reduction:
        return self.map(lambda e: rename_loads(e, names))


@dataclass(frozen=True, kw_only=True)
class Scan(Node):
    """Inclusive scans side by side: ``outs[axes]`` is the fold, in order, of ``exprs`` at all positions along one axis
    up to and including this one.

    Attributes:
        outs: results; one axis a dimension, so each has the full size.
        along: the variable of the scanned axis, one of ``axes``.
        exprs: what enters at each position, in the accumulation dtypes (outs may be narrower).
        combine: the associative rule, one expression a result over the locals ``ir.combine.left(k)`` (everything
            before) and ``ir.combine.right(k)`` (what follows).
        start: neutral elements that the fold starts from; empty if the rule has none, then the first element is the
            start.
    """

    outs: tuple[Value, ...]
    axes: tuple[Axis, ...]
    along: sympy.Symbol
    exprs: tuple[ex.Expr, ...]
    combine: tuple[ex.Expr, ...]
    start: tuple[ex.Const, ...] = ()

    @property
    def defs(self) -> tuple[Value, ...]:
        return self.outs

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        return _buffers(*self.exprs)

    def map(self, change: Callable[[ex.Expr], ex.Expr]) -> Scan:
        """The same scan of changed expressions."""
        return replace(self, exprs=tuple(change(e) for e in self.exprs))

    def rename(self, names: dict[str, str]) -> Scan:
        return self.map(lambda e: rename_loads(e, names))


@dataclass(frozen=True, kw_only=True)
class View(Node):
    """``out[axes]`` is ``base[index]``. Index maps may use floor division and modulo; if the map is affine in the
    base's storage the view can alias it, otherwise whoever needs memory gets a copy (``analyse.alias`` decides)."""

    out: Value
    base: str
    axes: tuple[Axis, ...]
    index: tuple[sympy.Expr, ...]

    @property
    def defs(self) -> tuple[Value, ...]:
        return (self.out,)

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.base,)

    def rename(self, names: dict[str, str]) -> View:
        return replace(self, base=names.get(self.base, self.base))


@dataclass(frozen=True, kw_only=True)
class Store(Node):
    """``target[index] = expr`` (mode ``set``) or ``+= expr`` (mode ``add``, safe for repeated positions) for all axes.

    ``index`` has one entry per dimension of ``target`` and may use ``q0..`` for data-dependent positions in ``bind``.
    ``out`` is ``target`` afterwards: same storage, shape and strides.
    """

    out: Value
    target: str
    axes: tuple[Axis, ...]
    index: tuple[sympy.Expr, ...]
    expr: ex.Expr
    bind: tuple[ex.Expr, ...] = ()
    mode: str = "set"

    @property
    def defs(self) -> tuple[Value, ...]:
        return (self.out,)

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys((self.target, *_buffers(self.expr, *self.bind))))

    @property
    def mutates(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def has_effect(self) -> bool:
        return True

    @property
    def exprs(self) -> tuple[ex.Expr, ...]:
        return (self.expr,)

    def map(self, change: Callable[[ex.Expr], ex.Expr]) -> Store:
        """The same store of a changed expression at a changed position."""
        return replace(self, expr=change(self.expr), bind=tuple(change(b) for b in self.bind))

    def rename(self, names: dict[str, str]) -> Store:
        changed = self.map(lambda e: rename_loads(e, names))
        return replace(changed, target=names.get(self.target, self.target))


Loop: TypeAlias = Pointwise | Reduction | Scan | Store
"""Nodes that iterate: an expression (``exprs``) evaluated at every position of their axes."""


def loop_axes(node: Loop) -> tuple[Axis, ...]:
    """Every axis ``node`` iterates, reduced ones last."""
    return node.axes + node.raxes if isinstance(node, Reduction) else node.axes


@dataclass(frozen=True, kw_only=True)
class Pack(Node):
    """A flat buffer holding the elements of ``parts`` one after another, each in row-major order.

    The memory planner places a part that dies here directly at its position, so that packing it costs nothing.
    """

    out: Value
    parts: tuple[str, ...]

    @property
    def defs(self) -> tuple[Value, ...]:
        return (self.out,)

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.parts))

    def rename(self, names: dict[str, str]) -> Pack:
        return replace(self, parts=tuple(names.get(p, p) for p in self.parts))


@dataclass(frozen=True, kw_only=True)
class Extern(Node):
    """A call into a library.

    Attributes:
        outs: tensors it returns, in order; an output that is not a tensor is None.
        op: ``"aten.mm.default"``, ``"mylib.op.overload"``, or a ``dcompile.*`` runtime helper.
        args, kwargs: see ``Arg``.
        writes: operands the call writes. Each written operand's next version follows ``outs`` in ``defs`` through
            ``versions``, in the same order.
        out_op: overload that writes its result into given memory (``"aten.mm.out"``); None if the library allocates.
        aliases: for each out the operand whose storage it shares, or None. Empty means none does.
        effect: stays although unused (prints, random state, unknown communication).
        fallback: no lowering rule exists; counted and named by ``dcompile.explain``.
        barrier: communicates in a way the compiler does not know: nothing moves across it.
        seq: one tensor in a list (False: the call returns ``outs[0]`` itself; True: a tuple or list).
        nested: there are tuples and lists in that tuple or list; ``outs`` are the leaves in order.
        promises: numbers that the call returned while tracing and that stand as constants in the program since, with
            their position among the results. The call must return them again.
        binds: numbers that the call tells (``ir.symbolic``), each before those it is needed to find.
    """

    outs: tuple[Value | None, ...]
    op: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    writes: tuple[str, ...] = ()
    versions: tuple[Value, ...] = ()
    out_op: str | None = None
    aliases: tuple[str | None, ...] = ()
    effect: bool = False
    fallback: bool = False
    barrier: bool = False
    seq: bool = False
    binds: tuple[Number, ...] = ()
    nested: bool = False
    promises: tuple[tuple[int, Size | float | bool], ...] = ()

    @cached_property
    def defs(self) -> tuple[Def, ...]:  # type: ignore[override]
        return (*(out for out in self.outs if out is not None), *self.versions, *self.binds)

    @cached_property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        found: dict[str, None] = {}
        for arg in (*self.args, *(value for _, value in self.kwargs)):
            _refs(arg, found)
        return tuple(found)

    @property
    def mutates(self) -> tuple[str, ...]:
        return self.writes

    @property
    def has_effect(self) -> bool:
        return self.effect or self.barrier or bool(self.writes)

    def rename(self, names: dict[str, str]) -> Extern:
        return replace(
            self,
            args=tuple(_rename_arg(a, names) for a in self.args),
            kwargs=tuple((k, _rename_arg(a, names)) for k, a in self.kwargs),
            writes=tuple(names.get(w, w) for w in self.writes),
            aliases=tuple(names.get(a, a) if a else a for a in self.aliases),
        )


def literals(arg: Arg) -> tuple[Literal, ...]:
    """All literals in an argument."""
    if isinstance(arg, tuple):
        return tuple(found for item in arg for found in literals(item))
    return (arg,) if isinstance(arg, Literal) else ()


def calls_programs(node: Node) -> bool:
    """Whether ``node`` is a library call that runs other programs."""
    if not isinstance(node, Extern):
        return False
    return node.op.startswith("higher_order.") or any(
        found.kind in ("graph", "module") for arg in node.args for found in literals(arg)
    )


def rename_loads(root: ex.Expr, names: dict[str, str]) -> ex.Expr:
    """``root`` with buffers renamed."""

    def leaf(node: ex.Expr) -> ex.Expr | None:
        if isinstance(node, ex.Load) and node.buffer in names:
            return ex.load(names[node.buffer], node.index, node.dtype, node.bind)
        return None

    return ex.transform(root, leaf)


def _buffers(*roots: ex.Expr) -> tuple[str, ...]:
    return tuple(dict.fromkeys(load.buffer for root in roots for load in ex.loads(root)))


def _refs(arg: Arg, found: dict[str, None]) -> None:
    if isinstance(arg, Ref):
        found[arg.name] = None
    elif isinstance(arg, tuple):
        for item in arg:
            _refs(item, found)


def _rename_arg(arg: Arg, names: dict[str, str]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(names.get(arg.name, arg.name), arg.item)
    if isinstance(arg, tuple):
        return tuple(_rename_arg(item, names) for item in arg)
    return arg


__all__ = [
    "Arg",
    "Axis",
    "Extern",
    "Literal",
    "Loop",
    "Node",
    "Pack",
    "Pointwise",
    "Reduction",
    "Ref",
    "Scan",
    "Store",
    "View",
    "calls_programs",
    "literals",
    "loop_axes",
    "rename_loads",
]
