"""Ops that take programs: conditionals, loops, and whatever else the tracer keeps whole.

The programs of ``CLOSED`` ops are lowered once, as graphs of their own, and compiled like any graph. A call names them
(``<graph "true_graph_0">``) and passes them all they need, also the constants and sizes that the traced program takes
from outside. Any other op is called in the library with its traced programs as they are (``<module "score_0">``): a
fallback, counted by the op's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import sympy
import torch
from torch import fx

from dcompile.analyse.alias import storage_roots
from dcompile.collectives.nodes import Start
from dcompile.errors import Unsupported
from dcompile.ir.graph import SizeInput
from dcompile.ir.nodes import Arg, Extern, Literal, Ref
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.fallback import convert

if TYPE_CHECKING:
    from dcompile.lower.lowered import Lowered

Layouts = tuple[Value | None, ...] | None
"""What a program must return, None where the caller does not mind."""


@dataclass(frozen=True)
class SubProgram:
    """A traced program that another takes as an argument."""

    name: str
    module: Any


@dataclass
class SubPrograms:
    """All programs one graph calls.

    Attributes:
        lower: lowers one of them, given its name and what it must return.
        constant: makes a constant tensor an operand of the calling graph.
        lowered: those that are compiled, by name.
        modules: those that the library calls, by name.
        named: each program once, by the identity of its traced form.
    """

    lower: Callable[[fx.GraphModule, str, Layouts], Lowered]
    constant: Callable[[str, torch.Tensor], Value]
    lowered: dict[str, Lowered]
    modules: dict[str, Any]
    named: dict[int, SubProgram] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """How a ``CLOSED`` op takes its programs.

    Attributes:
        programs: positions of the programs among its arguments.
        returning: those that return what the op returns.
    """

    programs: tuple[int, ...]
    returning: tuple[int, ...]


CLOSED: dict[str, Shape] = {
    "cond": Shape(programs=(1, 2), returning=(1, 2)),  # predicate, when true, when false, operands
    "while_loop": Shape(programs=(0, 1), returning=(1,)),  # condition, body, carried, further operands
    "invoke_subgraph": Shape(programs=(0,), returning=(0,)),  # program, identifier, *operands
    "map_impl": Shape(programs=(0,), returning=()),  # body, operands taken apart, further operands
    "scan": Shape(programs=(0,), returning=()),  # combine, first carried, operands taken apart, further operands
}
"""Ops whose programs are compiled; ``runtime.programs`` runs them."""


def call_programs(lowering: Lowering, subs: SubPrograms, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Emit a call of the higher-order op ``op`` and give what it returns.

    Raises:
        Unsupported: a program returns an operand or one tensor twice, or communicates.
    """
    name = str(op.name() if callable(getattr(op, "name", None)) else op)
    outs = lowering.outs
    binds = lowering.learn(outs)
    returned: tuple[Any, ...] = outs
    shape = CLOSED.get(name)
    further: tuple[Arg, ...] = ()
    effect = False
    if shape is None:
        given = tuple(_opened(subs, arg) for arg in args)
        called = f"higher_order.{name}"
    else:
        given, effect = _closed(lowering, subs, name, shape, args)
        further = tuple(given[len(args) :])
        given = given[: len(args)]
        called = f"dcompile.{name}"
        if name == "invoke_subgraph":
            returned = _handed_back(subs.lowered[args[0].name], args[2:], outs)
            outs = tuple(out if found is out else None for out, found in zip(outs, returned, strict=True))
    lowering.emit(
        Extern(
            outs=outs,
            op=called,
            args=(*(argument(lowering, arg) for arg in given), *further),
            kwargs=tuple((key, argument(lowering, _opened(subs, arg))) for key, arg in kwargs.items()),
            binds=binds,
            effect=effect,
            fallback=shape is None,
            seq=isinstance(lowering.node.meta.get("val"), list | tuple),
            origin=lowering.origin,
        )
    )
    return returned if isinstance(lowering.node.meta.get("val"), list | tuple) else returned[0]


def argument(lowering: Lowering, arg: Any) -> Arg:
    """As ``fallback.convert``, programs and plain dictionaries included."""
    if isinstance(arg, Literal):
        return arg
    if isinstance(arg, tuple | list):
        return tuple(argument(lowering, item) for item in arg)
    if isinstance(arg, dict):
        return (Literal("dict", ",".join(map(str, arg))), *(argument(lowering, item) for item in arg.values()))
    return convert(lowering, arg)


def _opened(subs: SubPrograms, arg: Any) -> Any:
    """``arg`` with programs as the library takes them."""
    if isinstance(arg, SubProgram):
        subs.modules[arg.name] = arg.module
        return Literal("module", arg.name)
    if isinstance(arg, tuple | list):
        return tuple(_opened(subs, item) for item in arg)
    return arg


def _closed(
    lowering: Lowering, subs: SubPrograms, name: str, shape: Shape, args: tuple[Any, ...]
) -> tuple[tuple[Any, ...], bool]:
    """The arguments with programs named, followed by what each program takes besides; and whether one has effects."""
    given = list(args)
    further: list[Arg] = []
    effect = False
    for position in shape.programs:
        program: SubProgram = args[position]
        wanted = lowering.outs if position in shape.returning else None
        found = subs.lowered.get(program.name) or subs.lower(program.module, program.name, wanted)
        _check_program(lowering, name, found)
        effect = effect or any(node.has_effect for node in found.graph.nodes)
        subs.lowered[program.name] = found
        given[position] = Literal("graph", program.name)
        further.append(_further(lowering, subs, program.name, found))
    return (*given, *further), effect


def _further(lowering: Lowering, subs: SubPrograms, name: str, found: Lowered) -> tuple[Arg, ...]:
    """What a program takes besides the operands it was traced with."""
    inputs = found.graph.inputs[len(found.graph.inputs) - len(found.extra_inputs) :]
    passed: list[Arg] = []
    for item, extra in zip(inputs, found.extra_inputs, strict=True):
        if isinstance(item, SizeInput):
            lowering.sizes.hints.setdefault(item.symbol, item.hint)
            passed.append(item.symbol)
        else:
            assert isinstance(extra, torch.Tensor)
            passed.append(Ref(subs.constant(f"{name}_{item.name}", extra).name))
    return tuple(passed)


def _handed_back(found: Lowered, operands: tuple[Any, ...], outs: tuple[Value | None, ...]) -> tuple[Any, ...]:
    """What a call returns: an operand where the program only hands it back, one result where it returns it twice."""
    given = {item.name: operands[n] for n, item in enumerate(found.graph.inputs[: len(operands)]) if _is_value(item)}
    seen: dict[str, Any] = {}
    returned: list[Any] = []
    for item, out in zip(found.graph.outputs, outs, strict=True):
        if isinstance(item, Ref):
            out = given[item.name] if item.name in given else seen.setdefault(item.name, out)
        returned.append(out)
    return tuple(returned)


def _is_value(item: object) -> TypeGuard[Value]:
    return isinstance(item, Value)


def _check_program(lowering: Lowering, name: str, found: Lowered) -> None:
    graph = found.graph
    talking = [node for node in graph.nodes if isinstance(node, Start) or (isinstance(node, Extern) and node.barrier)]
    if talking:
        raise Unsupported(
            talking[0].origin,
            what=f"{', '.join(talking[0].origin.ops)} inside {name}: ranks may not agree on whether it runs",
            instead="communicate before or after it, on every rank",
        )
    if name not in ("cond", "while_loop", "invoke_subgraph"):
        return  # results are stacked
    free = name == "invoke_subgraph"
    roots = storage_roots(graph)
    owners = {roots[name]: name for name in graph.input_names}
    for out in graph.outputs:
        if not isinstance(out, Ref) or (
            free and (out.name in graph.input_names or owners.get(roots[out.name]) == out.name)
        ):
            continue
        root = roots[out.name]
        if root in owners:
            what = f"operand {owners[root]}" if owners[root] in graph.input_names else "another of its results"
            raise Unsupported(
                lowering.origin,
                what=f"{graph.name}, a program of {name} that returns memory of {what}",
                instead="return a .clone() of it",
            )
        owners[root] = out.name


def conform(lowering: Lowering, found: Value, wanted: Value | None) -> Value:
    """``found`` in the layout of ``wanted``, copied if need be: all branches of a conditional return one layout."""
    if wanted is None or found.stride == wanted.stride or found.shape != wanted.shape:
        return found
    known = {s for size in (*found.shape, *found.stride) if isinstance(size, sympy.Expr) for s in size.free_symbols}
    for size in wanted.stride:
        if isinstance(size, sympy.Expr) and not size.free_symbols <= known:
            return found
    out = Value(lowering.fresh(f"{found.name}_laid_out"), found.dtype, found.shape, wanted.stride, found.device)
    return lowering.pointwise(out, lowering.element(found, found.shape))
