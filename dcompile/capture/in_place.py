"""Writes that functionalisation turned into new tensors become writes again, where nobody can tell the difference.

AOTAutograd expresses ``x[1:3].add_(y)`` as a new tensor ``slice_scatter(x, …)`` that is copied over ``x`` at the end,
and a call of a custom op that writes its arguments as ``auto_functionalized_v2``, which returns new versions of them.
Taken literally, each costs a copy of the whole tensor. Here the first becomes a write into a view of ``x``, the second
the call itself, on the old tensors if nobody reads those afterwards and on copies of them otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext

from dcompile.capture.storages import Storages

aten = torch.ops.aten

_VIEW_OF: dict[Any, tuple[Any, int]] = {
    aten.slice_scatter.default: (aten.slice.Tensor, 2),
    aten.select_scatter.default: (aten.select.int, 2),
    aten.diagonal_scatter.default: (aten.diagonal.default, 2),
    aten.as_strided_scatter.default: (aten.as_strided.default, 2),
}
"""Ops that give their first operand with a part replaced by the second: the view of that part, and where in the
arguments the view's own begin."""

_WRITES: dict[Any, Any] = {
    aten.copy.default: aten.copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter.reduce: aten.scatter_.reduce,
    aten.scatter.value_reduce: aten.scatter_.value_reduce,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter_reduce.two: aten.scatter_reduce_.two,
    aten.index_add.default: aten.index_add_.default,
    aten.index_copy.default: aten.index_copy_.default,
}
"""Ops that give their first operand with elements replaced: the same in place."""


_OF_AN_INPUT = (OutputType.alias_of_input, OutputType.is_input)


@dataclass(frozen=True)
class _Step:
    """A node that gives a new version of a tensor: ``result`` is its ``number``-th base changed by ``node``."""

    node: fx.Node
    base: fx.Node
    number: int
    result: fx.Node


_Spot = tuple[fx.Node, int]
"""A node and one of its bases by number; rewriting replaces the bases themselves."""


def write_in_place(gm: fx.GraphModule) -> None:
    """Rewrite ``gm``, a functional graph whose mutations of inputs stand at the end as ``copy_``, in place.

    What the graph returns must be as it would be in eager: part of the input, or memory of its own. AOTAutograd knows
    for which outputs its caller takes a view of the input instead; those may be either.
    """
    steps = {step.result: step for step in _steps(gm)}
    if not steps and not any(_is_functionalised(node) for node in gm.graph.nodes):
        return
    storages = Storages(gm)
    apart = _returned_apart(gm)
    overwritten: set[_Spot] = set()
    for copy in [node for node in gm.graph.nodes if node.target is aten.copy_.default]:
        overwritten |= _overwritten_inputs(copy, steps, storages, apart)
    for step in steps.values():
        if _is_functionalised(step.node) and _dies(step, storages):
            overwritten.add((step.node, step.number))
            storages.join(step.base, step.result)
    for node in list(gm.graph.nodes):
        if _is_functionalised(node):
            _Call(node, overwritten).write()
        elif node in steps and (node, 0) in overwritten:
            _write(node)
    _drop_copies_onto_themselves(gm)
    gm.graph.lint()


def _steps(gm: fx.GraphModule) -> list[_Step]:
    found = []
    for node in gm.graph.nodes:
        if node.target in _VIEW_OF or node.target in _WRITES:
            found.append(_Step(node, node.args[0], 0, node))
        elif _is_functionalised(node):
            bases, first = node.kwargs.get("_all_bases", ()), _first_base(node)
            for user in node.users:
                if user.target is operator.getitem and user.args[1] >= first:
                    number = user.args[1] - first
                    found.append(_Step(node, bases[number], number, user))
    return found


def _is_functionalised(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.auto_functionalized_v2


def _first_base(node: fx.Node) -> int:
    """Position of the first new version among the results of a functionalised call; ``None`` stands for no results."""
    return max(len(node.args[0]._schema.returns), 1)  # type: ignore[union-attr]


def _returned_apart(gm: fx.GraphModule) -> set[fx.Node]:
    """Outputs of ``gm`` that must have memory of their own."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    returned: Any = output.args[0]
    nodes = list(returned) if isinstance(returned, list | tuple) else [returned]
    tracing = TracingContext.try_get()
    known = tracing.fw_metadata if tracing is not None else None
    if known is not None:
        first = len(nodes) - len(known.output_info)
        if first == known.num_mutated_inp_runtime_indices:  # an inference graph: nothing is saved for a backward
            told = {n + first for n, info in enumerate(known.output_info) if info.output_type in _OF_AN_INPUT}
            nodes = [node for n, node in enumerate(nodes) if n not in told]
    return {node for node in nodes if isinstance(node, fx.Node)}


def _overwritten_inputs(
    copy: fx.Node, steps: dict[fx.Node, _Step], storages: Storages, apart: set[fx.Node]
) -> set[_Spot]:
    """The steps that lead from an input to what ``copy`` writes over it, if all may work in the input's memory."""
    target, at = copy.args[:2]
    if not isinstance(target, fx.Node) or target.op != "placeholder":
        return set()
    chain: list[_Step] = []
    while isinstance(at, fx.Node) and at in steps:
        chain.insert(0, steps[at])
        at = steps[at].base
    if at is not target or any(not _same_place(target, step.result) for step in chain):
        return set()
    olds, news = storages.members(target), list[fx.Node]()
    for step in chain:
        limit = storages.position[step.node]
        readers = {user for member in (*olds, *news) for user in member.users if storages.position[user] > limit}
        if any(user is not copy and user.op != "output" for user in readers) or _reads_elsewhere(step, storages):
            return set()
        news += storages.members(step.result)
    if not apart.isdisjoint(news):
        return set()
    for step in chain:
        storages.join(target, step.result)
    return {(step.node, step.number) for step in chain}


def _same_place(a: fx.Node, b: fx.Node) -> bool:
    """Whether views of ``a`` and of ``b`` are described by the same numbers."""
    x, y = a.meta["val"], b.meta["val"]
    same = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device
    return bool(same and x.storage_offset() == y.storage_offset())


def _reads_elsewhere(step: _Step, storages: Storages) -> bool:
    """Whether a call reads what it writes through another operand: eager forbids or defines that op by op.

    Writes of our own (``copy_`` into a view) are loops, which look after that themselves.
    """
    if step.node.target in _VIEW_OF:
        return False
    others = [n for n in step.node.all_input_nodes if n is not step.base]
    return storages.shared_with(step.base, others)


def _dies(step: _Step, storages: Storages) -> bool:
    """Whether a custom op may write into the very tensor: it is the program's own and nobody reads it afterwards."""
    value = step.base.meta["val"]
    dense = all(stride != 0 or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    if not dense or storages.belongs_outside(step.base) or _reads_elsewhere(step, storages):
        return False
    return not any(user is not step.result for user in storages.readers_after(step.base, step.node))


def _write(node: fx.Node) -> None:
    """``node`` becomes a write into its first operand."""
    base: Any = node.args[0]
    graph = node.graph
    with graph.inserting_before(node):
        if node.target in _VIEW_OF:
            view, first = _VIEW_OF[node.target]
            part = _add(node, view, (base, *node.args[first:]), dict(node.kwargs), _view_value)
            source = node.args[1]
            _add(node, aten.copy_.default, (part, source), {}, lambda *_: part.meta["val"])
        else:
            written = _WRITES[node.target]
            _add(node, written, node.args, dict(node.kwargs), lambda *_: base.meta["val"])
    node.replace_all_uses_with(base)
    graph.erase_node(node)


def _add(like: fx.Node, target: Any, args: Any, kwargs: dict[str, Any], value: Callable[..., Any]) -> fx.Node:
    """A call at the current place of the graph that stands for ``like``."""
    made = like.graph.call_function(target, args, kwargs)
    made.meta = {**like.meta, "val": value(target, args, kwargs)}
    return made


def _view_value(target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a call gives for the fake tensors of its arguments."""
    actual_args = fx.map_arg(args, lambda n: n.meta["val"])
    actual_kwargs = fx.map_arg(kwargs, lambda n: n.meta["val"])
    return target(*actual_args, **actual_kwargs)


class _Call:
    """One ``auto_functionalized_v2`` node, about to become a call of the op it names."""

    def __init__(self, node: fx.Node, overwritten: set[_Spot]) -> None:
        self.node, self.graph = node, node.graph
        self.op: Any = node.args[0]
        self.given = dict(node.kwargs)
        bases: Any = self.given.pop("_all_bases", ())
        self.bases: tuple[fx.Node, ...] = tuple(bases)
        self.in_place = [(node, number) in overwritten for number in range(len(self.bases))]
        self.targets: list[fx.Node] = []

    def write(self) -> None:
        schema = self.op._schema
        with self.graph.inserting_before(self.node):
            self.targets = [
                base if kept else self.copy_of(base) for base, kept in zip(self.bases, self.in_place, strict=True)
            ]
            args, kwargs, written = [], {}, []
            for argument in schema.arguments:
                info = argument.alias_info
                actual = (
                    self.operand(argument.name) if info is not None and info.is_write else self.given[argument.name]
                )
                if info is not None and info.is_write:
                    written.append(actual)
                if argument.kwarg_only:
                    kwargs[argument.name] = actual
                else:
                    args.append(actual)
            values = self.node.meta.get("val")
            call = _add(self.node, self.op, tuple(args), kwargs, lambda *_: self.own_results(values))
        self.hand_over(call, written)
        self.graph.erase_node(self.node)

    def own_results(self, values: Any) -> Any:
        """What the op itself returns, of what the functionalised call does."""
        count = len(self.op._schema.returns)
        if count == 0:
            return None
        if not isinstance(values, list | tuple):
            return values
        return values[0] if count == 1 else tuple(values[:count])

    def copy_of(self, base: fx.Node) -> fx.Node:
        """The same elements in the same layout, in memory that nobody else looks at."""
        value = base.meta["val"]
        copy = _add(self.node, aten.clone.default, (base,), {}, _view_value)
        if copy.meta["val"].stride() == value.stride():
            return copy
        self.graph.erase_node(copy)
        layout = (list(value.shape), list(value.stride()))
        room = _add(self.node, aten.empty_strided.default, layout, _options(value), _view_value)
        _add(self.node, aten.copy_.default, (room, base), {}, lambda *_: room.meta["val"])
        return room

    def operand(self, name: str) -> Any:
        """What the op is to write for its argument ``name``."""
        prefix = f"_{name}"
        if f"{prefix}_dtype" in self.given:  # an out argument: described, not given
            size, stride = self.given[f"{prefix}_size"], self.given[f"{prefix}_stride"]
            options = {"dtype": self.given[f"{prefix}_dtype"], "device": self.given[f"{prefix}_device"]}
            return _add(self.node, aten.empty_strided.default, (size, stride), options, _view_value)
        if f"{prefix}_length" in self.given:
            length: Any = self.given[f"{prefix}_length"]
            return None if length is None else [self.part(f"{prefix}_{n}") for n in range(length)]
        return self.part(prefix)

    def part(self, prefix: str) -> Any:
        """The view of a target that the call's description names."""
        given = self.given
        number: Any = given[f"{prefix}_base_index"]
        if number is None:
            return None
        target = self.targets[number]
        if f"{prefix}_storage_offset" in given:
            layout = (given[f"{prefix}_size"], given[f"{prefix}_stride"], given[f"{prefix}_storage_offset"])
            return _add(self.node, aten.as_strided.default, (target, *layout), {}, _view_value)
        if f"{prefix}_slice_dim" in given:
            bounds = (given[f"{prefix}_slice_dim"], given[f"{prefix}_slice_start"], given[f"{prefix}_slice_end"])
            return _add(self.node, aten.slice.Tensor, (target, *bounds), {}, _view_value)
        return target

    def hand_over(self, call: fx.Node, written: list[Any]) -> None:
        """Users of the functionalised call's results use the op's results and the written tensors."""
        returned = self.op._schema.returns
        results: list[Any] = [call] if len(returned) == 1 else [None] * max(len(returned), 1)
        for n, info in enumerate(returned):
            if info.alias_info is not None and n < len(written) and isinstance(written[n], fx.Node):
                results[n] = written[n]  # the op returns what it wrote
        results += self.targets
        values = self.node.meta.get("val")
        if not isinstance(values, list | tuple):
            self.node.replace_all_uses_with(results[0])
            return
        for user in list(self.node.users):
            position: Any = user.args[1]
            found = results[position]
            if found is None:
                with self.graph.inserting_before(user):
                    found = _add(user, operator.getitem, (call, position), {}, lambda *_, p=position: values[p])
            user.replace_all_uses_with(found)
            self.graph.erase_node(user)


def _options(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": value.dtype, "device": value.device}


def _drop_copies_onto_themselves(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.target is aten.copy_.default and node.args[0] is node.args[1]:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
