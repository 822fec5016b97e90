"""From an fx graph of ATen ops to a Graph at level LOOPS: about one node per op, no fusion."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from dcompile.errors import CompilerBug, Unsupported
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, Output, SizeInput
from dcompile.ir.index import symbol
from dcompile.ir.nodes import Extern, Literal, Ref
from dcompile.ir.types import DType, Origin, Size, Value
from dcompile.lower.builder import SEED_NAMES, Lowering
from dcompile.lower.constants import OnDevice, rebuilt
from dcompile.lower.fallback import call_library, gives_only_numbers
from dcompile.lower.flight import InFlight, ViewInFlight
from dcompile.lower.higher_order import Layouts, SubProgram, SubPrograms, call_programs, conform
from dcompile.lower.numbers import ITEM, Numbers
from dcompile.lower.point_to_point import finish_open
from dcompile.lower.table import RULES, NoRule, Rule
from dcompile.lower.user_kernel import LAUNCHING, launch

_DROPPED = frozenset({"aten._assert_tensor_metadata.default"})
"""Checks of dtypes and devices, which are the same in every call."""
_RANGES = frozenset({"aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default"})
_VIEW_OPS = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice",
        "select", "split", "split_with_sizes", "unbind", "alias", "detach", "as_strided",
    }
)  # fmt: skip
"""Views that may be taken of a collective's result before its wait."""
_NO_NUMBER = object()
SCALAR = "dcompile_scalar"
"""Key of ``node.meta`` for the number in a constant tensor of one element, which cannot tell it while tracing."""


@dataclass(frozen=True)
class SizeOf:
    """Size ``dim`` of the tensor input at position ``input``."""

    input: int
    dim: int


Extra = torch.Tensor | OnDevice | SizeOf
"""An input the traced program does not list: a constant tensor, or a size symbol that is only known as an extent."""


@dataclass(frozen=True)
class Lowered:
    """Result of ``lower``.

    Attributes:
        graph: at level LOOPS, checked.
        group_names: process group (as the traced program names it) by the group's label in the graph.
        extra_inputs: what the caller appends to the program's own inputs, in this order.
        programs: those of ``graph.graphs`` by name; what they take besides their operands, the calls pass.
        modules: traced programs that only the library can run, by name.
    """

    graph: Graph
    group_names: dict[str, Any]
    extra_inputs: tuple[Extra, ...] = ()
    programs: Mapping[str, Lowered] = field(default_factory=dict)
    modules: Mapping[str, Any] = field(default_factory=dict)


def no_group_size(name: Any) -> int:
    """Default of ``lower``'s ``group_size``.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(None, f"a collective over group {name!r} of unknown size", "pass group_size= to lower()")


def lower(
    gm: fx.GraphModule,
    name: str,
    eager_ops: frozenset[str] = frozenset(),
    group_size: Callable[[Any], int] = no_group_size,
    tracebacks: bool = False,
) -> Lowered:
    """Lower a traced program.

    Args:
        gm: ATen ops, decomposed and functional; nodes have ``meta["val"]`` and may have ``meta["dcompile_source"]``.
        name: name of the graph.
        eager_ops: ops that stay library calls, as ``"aten.exp.default"`` or ``"exp"``.
        group_size: number of ranks of a process group; asked only where the op itself does not tell.
        tracebacks: origins keep the frames that led to each node.

    Raises:
        Unsupported: naming the user's line, for what neither a rule nor a library call can express.
    """
    return _Walker(gm, eager_ops, group_size, tracebacks).run(name)


def checked(op: str, found: Any) -> Any:
    """What the rule of ``op`` returned: tensors, numbers, views in flight, None, and lists, tuples or dicts of these.

    Raises:
        CompilerBug: anything else, by the name of its type.
    """
    if isinstance(found, list | tuple):
        for item in found:
            checked(op, item)
    elif isinstance(found, dict):
        checked(op, tuple(found.values()))
    elif not (found is None or isinstance(found, Value | InFlight | ViewInFlight | bool | int | float | sympy.Basic)):
        raise CompilerBug(f"the lowering rule of {op} returned a {type(found).__name__}")
    return found


class _Walker:
    def __init__(
        self, gm: fx.GraphModule, eager_ops: frozenset[str], group_size: Callable[[Any], int], tracebacks: bool
    ) -> None:
        self.gm = gm
        self.eager_ops = eager_ops
        self.tracebacks = tracebacks
        self.lowering = Lowering(set(SEED_NAMES.values()), group_size)
        self.numbers = Numbers(self.lowering)
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[Value | SizeInput] = []
        self.constants: list[tuple[Value, torch.Tensor | OnDevice]] = []
        self.names: dict[fx.Node, str] = {}
        self.rules: dict[Any, tuple[str, Rule | None]] = {}
        self.subs = SubPrograms(self.lower_program, self.constant, {}, {})

    def lower_program(self, gm: fx.GraphModule, name: str, layouts: Layouts) -> Lowered:
        """A program that this one calls."""
        return _Walker(gm, self.eager_ops, self.lowering.group_size, self.tracebacks).run(name, layouts)

    def constant(self, name: str, tensor: torch.Tensor) -> Value:
        """A constant tensor as an operand."""
        value = self.lowering.value(self.lowering.fresh(name), tensor)
        self.constants.append((value, tensor))
        return value

    def run(self, name: str, layouts: Layouts = None) -> Lowered:
        lowering = self.lowering
        # names of the traced program first, so that temporaries give way to them
        self.names = {node: lowering.fresh(node.name) for node in self.gm.graph.nodes}
        returned: Any = ()
        lowering.main_device = _main_device(self.gm)
        self.numbers.note_messages(self.gm.graph.nodes)
        for node in self.gm.graph.nodes:
            source = node.meta.get("dcompile_source", "")
            lowering.node = node
            stack = str(node.meta.get("stack_trace") or "").rstrip() if self.tracebacks else ""
            lowering.origin = lowering.sizes.origin = Origin((str(node.target),), source, stack)
            if node.op == "placeholder":
                self.env[node] = self.placeholder(node)
            elif node.op == "get_attr":
                self.env[node] = self.attribute(node)
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                returned = node.args[0]
            else:
                raise CompilerBug(f"lower: fx node {node.name} of kind {node.op} in a traced graph")
        lowering.flights.land_all()
        for sent in lowering.flights.unfinished():
            finish_open(lowering, sent, self.inputs)
        items = returned if isinstance(returned, list | tuple) else (returned,)
        wanted = layouts or (None,) * len(items)
        outputs = tuple(self.output(item, layout) for item, layout in zip(items, wanted, strict=True))
        extra = self.extra_inputs()
        programs = tuple(sub.graph for sub in self.subs.lowered.values())
        graph = Graph(name, tuple(self.inputs), (*self.seeds(), *lowering.nodes), outputs, programs)
        return Lowered(graph.check(), lowering.group_names, extra, self.subs.lowered, self.subs.modules)

    # inputs and outputs

    def placeholder(self, node: fx.Node) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.Tensor):
            value = self.lowering.value(self.names[node], meta)
            self.lowering.sizes.told(size for size in (*value.shape, *value.stride) if isinstance(size, sympy.Symbol))
            self.inputs.append(value)
            self.lowering.add_input(value)
            return value
        if isinstance(meta, torch.SymInt):
            size = self.lowering.sizes.size(meta)
            self.lowering.sizes.told((size,))
            known = {i.symbol for i in self.inputs if isinstance(i, SizeInput)}
            plain = isinstance(size, sympy.Symbol) and size not in known
            slot = size if plain else symbol(self.lowering.fresh(f"size_{node.name}"))
            self.inputs.append(SizeInput(slot, self.lowering.sizes.hint(size)))
            return size
        if isinstance(meta, int) and not isinstance(meta, bool):
            self.inputs.append(SizeInput(symbol(self.lowering.fresh(f"size_{node.name}")), meta))
            return meta
        raise Unsupported(
            self.lowering.origin,
            what=f"a graph input of type {type(meta).__name__}",
            instead="pass tensors and integers; make other values constants of the function",
        )

    def attribute(self, node: fx.Node) -> Any:
        found: Any = self.gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            return self.subs.named.setdefault(id(found), SubProgram(self.names[node], found))
        meta = node.meta.get("val", found)
        value = self.lowering.value(self.names[node], meta)
        if found.numel() == 1 and not value.dtype.library_only and type(found) in (torch.Tensor, torch.nn.Parameter):
            number = node.meta[SCALAR] if SCALAR in node.meta else found.item()
            return self.lowering.pointwise(value, ex.const(number, value.dtype))
        self.constants.append((value, found))
        return value

    def output(self, item: Any, wanted: Value | None = None) -> Output:
        found = self.resolve(item)
        if isinstance(found, Value):
            found = conform(self.lowering, found, wanted)
        meta = item.meta.get("val") if isinstance(item, fx.Node) else None
        if isinstance(meta, torch.SymBool) and isinstance(found, sympy.Expr):
            found = self.lowering.pointwise(
                self.lowering.temp("truth", DType.BOOL, (), self.lowering.main_device),
                ex.to(ex.index(found), DType.BOOL),
            )
        if isinstance(found, Value):
            return Ref(found.name, item=isinstance(meta, torch.SymBool | torch.SymFloat))
        if found is None or isinstance(found, bool | int | float | sympy.Expr):
            return found
        raise Unsupported(
            self.lowering.origin, f"a graph output of type {type(found).__name__}", "return tensors and numbers"
        )

    def extra_inputs(self) -> tuple[Extra, ...]:
        """Append inputs for size symbols that no integer input carries, and for constant tensors."""
        bound = {item.symbol for item in self.inputs if isinstance(item, SizeInput)} | self.lowering.learned
        extra: list[Extra] = []
        for missing in [s for s in self.lowering.sizes.hints if s not in bound]:
            place = next(
                (
                    SizeOf(position, value.shape.index(missing))
                    for position, value in enumerate(self.inputs)
                    if isinstance(value, Value) and missing in value.shape
                ),
                None,
            )
            if place is None:
                raise Unsupported(
                    self.lowering.origin,
                    what=f"the size symbol {missing}, which is neither an input nor the extent of one",
                    instead="mark the dimension static with torch._dynamo.mark_static",
                )
            self.inputs.append(SizeInput(missing, self.lowering.sizes.hints[missing]))
            extra.append(place)
        for value, tensor in self.constants:
            self.inputs.append(value)
            extra.append(tensor)
        return tuple(extra)

    def seeds(self) -> tuple[Extern, ...]:
        """One draw of seeds a device, for all random ops of the graph."""
        return tuple(
            Extern(
                outs=(Value(SEED_NAMES[device], DType.I64, (count,), (1,), device),),
                op="dcompile.seeds",
                args=(count,),
                kwargs=(("device", Literal("device", device)),) if device != "cpu" else (),
                effect=True,
                origin=Origin(("dcompile.seeds",)),
            )
            for device, count in self.lowering.seed_counts.items()
        )

    # calls

    def resolve(self, item: Any) -> Any:
        """An fx argument in the terms of rules."""
        if isinstance(item, fx.Node):
            return self.settled(self.env[item])
        if isinstance(item, list | tuple):
            return tuple(self.resolve(part) for part in item)
        if isinstance(item, torch.SymInt):
            return self.lowering.sizes.size(item)
        if isinstance(item, dict):
            return {key: self.resolve(part) for key, part in item.items()}
        if isinstance(item, slice):
            return slice(self.resolve(item.start), self.resolve(item.stop), self.resolve(item.step))
        return item

    def settled(self, found: Any) -> Any:
        if isinstance(found, Value):
            return self.lowering.current(found)
        if isinstance(found, InFlight):
            return self.lowering.current(self.lowering.flights.result(found))
        if isinstance(found, ViewInFlight):
            return self.settled(self.view_of_landed(found))
        if isinstance(found, tuple):
            return tuple(self.settled(part) for part in found)
        return found

    def view_of_landed(self, view: ViewInFlight) -> Any:
        self.lowering.flights.result(view.of)  # raises when unwaited
        if isinstance(self.env[view.node], ViewInFlight):
            current, origin = self.lowering.node, self.lowering.origin
            self.lowering.node, self.lowering.origin = view.node, Origin((str(view.node.target),), origin.source)
            self.env[view.node] = self.apply(view.node)
            self.lowering.node, self.lowering.origin = current, origin
        return self.env[view.node]

    def call(self, node: fx.Node) -> Any:
        target = node.target
        if target is operator.getitem:
            holder: Any = node.args[0]
            position: Any = node.args[1]
            found = self.env[holder]
            if isinstance(found, dict):
                return found[position]
            return found[position] if isinstance(found, tuple) else self.resolve(holder)[position]
        if isinstance(target, torch._ops.OpOverload) and gives_only_numbers(target):
            return self.apply(node)
        if (handled := self.number(node)) is not _NO_NUMBER:
            return handled
        meta = node.meta.get("val")
        if isinstance(meta, list | tuple) and meta and all(isinstance(item, int | torch.SymInt) for item in meta):
            return self.lowering.sizes.sizes(meta)
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.lowering.outs = self.outputs_of(node)
            args = tuple(self.resolve(arg) for arg in node.args)
            kwargs = {key: self.resolve(arg) for key, arg in node.kwargs.items()}
            if (name := getattr(target, "__name__", "")) in LAUNCHING:
                return launch(self.lowering, self.subs, name, kwargs)
            return call_programs(self.lowering, self.subs, target, args, kwargs)
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported(
                self.lowering.origin,
                what=f"the operator {target}",
                instead="keep it outside the compiled function, or write it with plain tensor operations",
            )
        if str(target) in _DROPPED:
            return None
        op, _ = self.rule_of(target)
        if op.startswith("_c10d_functional") and op.split(".")[1] == "wait_tensor":
            return self.wait(node.args[0])
        if (view := self.unwaited_view(node, op)) is not None:
            return view
        return self.apply(node)

    def number(self, node: fx.Node) -> Any:
        """A call that gives a number or asserts something of one; ``_NO_NUMBER`` for any other."""
        target, meta = str(node.target), node.meta.get("val")
        if target == ITEM:
            return self.numbers.item(node, self.resolve(node.args[0]))
        if target == "aten._assert_scalar.default":
            return self.numbers.assert_scalar(node)
        if target in _RANGES:
            return self.numbers.constrain_range(node)
        if isinstance(meta, torch.SymInt):
            return self.lowering.sizes.size(meta)
        if isinstance(meta, torch.SymFloat):
            return self.numbers.float(meta)
        if isinstance(meta, torch.SymBool):
            return self.numbers.truth(meta)
        if isinstance(meta, int | float | bool) and not isinstance(meta, torch.Tensor):
            return meta
        return _NO_NUMBER

    def wait(self, argument: Any) -> Any:
        found = self.env[argument]
        flight = found.of if isinstance(found, ViewInFlight) else found
        if isinstance(flight, InFlight):
            self.lowering.flights.land(flight.pending)
        elif isinstance(flight, Value):
            if (holder := self.lowering.flights.holder(flight)) is not None:
                self.lowering.flights.land(holder)
            else:
                finish_open(self.lowering, flight, self.inputs)
        return found

    def unwaited_view(self, node: fx.Node, op: str) -> ViewInFlight | None:
        if not node.args or not isinstance(node.args[0], fx.Node) or op.split(".")[1] not in _VIEW_OPS:
            return None
        found = self.env[node.args[0]]
        flight = found.of if isinstance(found, ViewInFlight) else found
        if isinstance(flight, InFlight) and self.lowering.flights.is_open(flight.pending):
            return ViewInFlight(node, flight)
        return None

    def rule_of(self, target: torch._ops.OpOverload) -> tuple[str, Rule | None]:
        """Name and rule of an op; no rule for those the user keeps eager."""
        found = self.rules.get(target)
        if found is None:
            name = str(target)
            kept = name in self.eager_ops or name.split(".")[1] in self.eager_ops
            found = self.rules[target] = (name, None if kept else RULES.get(name))
        return found

    def apply(self, node: fx.Node) -> Any:
        lowering = self.lowering
        target: Any = node.target
        op, rule = self.rule_of(target)
        args, kwargs = self.arguments(node, target)
        lowering.outs = self.outputs_of(node)
        if op == "aten._to_copy.default" and (found := rebuilt(lowering, args[0], self.constants)) is not None:
            value, constant = found
            if constant is not None:
                self.constants.append((value, constant))
            return value
        if rule is not None and self.allows(rule, args, kwargs):
            mark = len(lowering.nodes)
            try:
                return checked(op, rule.apply(lowering, *args, **kwargs))
            except NoRule:
                del lowering.nodes[mark:]
        kept = op in self.eager_ops or op.split(".")[1] in self.eager_ops
        found = call_library(lowering, target, args, kwargs, chosen=kept)
        flat = iter(found if isinstance(found, tuple) else (found,))
        return self.arranged(node.meta.get("val"), flat, iter(lowering.numbers.values()))

    def arranged(self, meta: Any, results: Iterator[Any], numbers: Iterator[Any]) -> Any:
        """Results of a call, given one by one, in the lists and tuples in which the call returns them."""
        if isinstance(meta, list | tuple):
            return tuple(self.arranged(item, results, numbers) for item in meta)
        found = next(results, None)
        return next(numbers) if _is_number(meta) else found

    def arguments(self, node: fx.Node, target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in the terms of rules; those that may be positional are, whatever way they were passed."""
        args = [self.resolve(arg) for arg in node.args]
        kwargs = {name: self.resolve(arg) for name, arg in node.kwargs.items()}
        if kwargs:
            for argument in target._schema.arguments[len(args) :]:
                if argument.kwarg_only or argument.name not in kwargs:
                    break
                args.append(kwargs.pop(argument.name))
        return tuple(args), kwargs

    def outputs_of(self, node: fx.Node) -> tuple[Value | None, ...]:
        meta = node.meta.get("val")
        name = self.names[node]
        self.lowering.numbers = {}
        if isinstance(meta, torch.Tensor):
            return (self.lowering.value(name, meta),)
        if not isinstance(meta, list | tuple) and not _is_number(meta):
            return ()
        outs: list[Value | None] = []
        for n, item in enumerate(_leaves(meta)):
            if _is_number(item):
                self.lowering.numbers[n] = self.known_number(item)
            is_tensor = isinstance(item, torch.Tensor)
            outs.append(self.lowering.value(self.lowering.fresh(f"{name}_{n}"), item) if is_tensor else None)
        return tuple(outs)

    def known_number(self, meta: Any) -> Any:
        """What stands for a number that a call returns."""
        if isinstance(meta, torch.SymFloat | torch.SymBool):
            raise Unsupported(
                self.lowering.origin,
                what=f"a {'truth' if isinstance(meta, torch.SymBool) else 'float'} that {self.lowering.node.target} "
                "computes from data",
                instead="return a tensor of no dimensions",
            )
        return self.lowering.sizes.size(meta) if isinstance(meta, torch.SymInt) else meta

    def allows(self, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operands are of kinds the rule can handle."""
        outs = [out for out in self.lowering.outs if out is not None]
        operands = [*_values(args), *_values(tuple(kwargs.values())), *outs]
        if not rule.any_dtype and any(v.dtype.library_only for v in operands):
            return False
        return rule.any_device or len({v.device for v in operands}) <= 1


def _main_device(gm: fx.GraphModule) -> str:
    """Where most of the program's tensors live: on the first device that holds one with dimensions."""
    for node in gm.graph.nodes:
        meta = node.meta.get("val")
        if isinstance(meta, torch.Tensor) and meta.dim() > 0:
            return meta.device.type
    return "cpu"


def _is_number(meta: Any) -> bool:
    numbers = bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(meta, numbers) and not isinstance(meta, torch.Tensor)


def _leaves(meta: Any) -> Iterator[Any]:
    if isinstance(meta, list | tuple):
        for item in meta:
            yield from _leaves(item)
    else:
        yield meta


def _values(args: tuple[Any, ...]) -> list[Value]:
    found: list[Value] = []
    for arg in args:
        if isinstance(arg, Value):
            found.append(arg)
        elif isinstance(arg, tuple):
            found.extend(_values(arg))
    return found


__all__ = ["Extra", "Lowered", "Size", "SizeOf", "lower", "no_group_size"]
