"""From an fx graph of ATen ops to a Graph at level LOOPS: about one node per op, no fusion."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from dcompile.errors import CompilerBug, Unsupported
from dcompile.ir.graph import Graph
from dcompile.ir.types import Origin, Size, Value
from dcompile.lower.builder import SEED_NAMES, Lowering
from dcompile.lower.constants import rebuilt
from dcompile.lower.edges import Edges
from dcompile.lower.fallback import call_library, gives_only_numbers
from dcompile.lower.flight import InFlight, ViewInFlight
from dcompile.lower.higher_order import Layouts, SubProgram, SubPrograms, call_programs
from dcompile.lower.lowered import Extra, Lowered, SizeOf
from dcompile.lower.numbers import ITEM, Numbers
from dcompile.lower.point_to_point import finish_open
from dcompile.lower.table import RULES, NoRule, Rule
from dcompile.lower.traced import is_number, leaves, main_device
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
        self.names: dict[fx.Node, str] = {}
        self.edges = Edges(self.lowering, gm, self.names)
        self.rules: dict[Any, tuple[str, Rule | None]] = {}
        self.subs = SubPrograms(self.lower_program, self.edges.constant, {}, {})

    def lower_program(self, gm: fx.GraphModule, name: str, layouts: Layouts) -> Lowered:
        """A program that this one calls."""
        return _Walker(gm, self.eager_ops, self.lowering.group_size, self.tracebacks).run(name, layouts)

    def run(self, name: str, layouts: Layouts = None) -> Lowered:
        lowering = self.lowering
        # names of the traced program first, so that temporaries give way to them
        self.names.update((node, lowering.fresh(node.name)) for node in self.gm.graph.nodes)
        returned: Any = ()
        lowering.main_device = main_device(self.gm)
        self.numbers.note_messages(self.gm.graph.nodes)
        for node in self.gm.graph.nodes:
            source = node.meta.get("dcompile_source", "")
            lowering.node = node
            stack = str(node.meta.get("stack_trace") or "").rstrip() if self.tracebacks else ""
            lowering.origin = lowering.sizes.origin = Origin((str(node.target),), source, stack)
            if node.op == "placeholder":
                self.env[node] = self.edges.placeholder(node)
            elif node.op == "get_attr":
                found = self.edges.attribute(node)
                self.env[node] = found if isinstance(found, Value) else self.program(node, found)
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                returned = node.args[0]
            else:
                raise CompilerBug(f"lower: fx node {node.name} of kind {node.op} in a traced graph")
        lowering.flights.land_all()
        for sent in lowering.flights.unfinished():
            finish_open(lowering, sent, self.edges.inputs)
        items = returned if isinstance(returned, list | tuple) else (returned,)
        wanted = layouts or (None,) * len(items)
        outputs = tuple(
            self.edges.output(item, self.resolve(item), layout) for item, layout in zip(items, wanted, strict=True)
        )
        extra = self.edges.extra_inputs()
        programs = tuple(sub.graph for sub in self.subs.lowered.values())
        graph = Graph(name, tuple(self.edges.inputs), (*self.edges.seeds(), *lowering.nodes), outputs, programs)
        return Lowered(graph.check(), lowering.group_names, extra, self.subs.lowered, self.subs.modules)

    def program(self, node: fx.Node, module: Any) -> SubProgram:
        """A traced program that is an attribute of this one."""
        return self.subs.named.setdefault(id(module), SubProgram(self.names[node], module))

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
                finish_open(self.lowering, flight, self.edges.inputs)
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
        if op == "aten._to_copy.default" and (found := rebuilt(lowering, args[0], self.edges.constants)) is not None:
            value, constant = found
            if constant is not None:
                self.edges.constants.append((value, constant))
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
        return next(numbers) if is_number(meta) else found

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
        if not isinstance(meta, list | tuple) and not is_number(meta):
            return ()
        outs: list[Value | None] = []
        for n, item in enumerate(leaves(meta)):
            if is_number(item):
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


def _values(args: tuple[Any, ...]) -> list[Value]:
    found: list[Value] = []
    for arg in args:
        if isinstance(arg, Value):
            found.append(arg)
        elif isinstance(arg, tuple):
            found.extend(_values(arg))
    return found


__all__ = ["Extra", "Lowered", "Size", "SizeOf", "lower", "no_group_size"]
