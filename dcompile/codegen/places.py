"""Where each tensor of a plan lies at run time, as an anchor the host program holds and a byte offset from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dcompile.analyse.alias import strided_views
from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import CompilerBug
from dcompile.ir.index import as_size
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.types import DType, Size, Value
from dcompile.plan import PARTS, Plan


@dataclass(frozen=True)
class Place:
    """Memory of one tensor.

    Attributes:
        anchor: name of the tensor the host program holds that the offset counts from: an input, a FRESH or LIBRARY
            storage, or a library result that aliases something. None: ``arena``.
        offset: bytes.
        shape, stride: as they are in memory, in elements of ``dtype``.
        arena: of what block it is a part (``plan.Storage.arena``), where there is no anchor.
    """

    anchor: str | None
    offset: Size
    dtype: DType
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    device: str
    arena: str = ""


def places(plan: Plan) -> dict[str, Place]:
    """The place of every tensor.

    Raises:
        CompilerBug: a view that is no strided alias, or a value without a slot.
    """
    graph = plan.graph
    views = strided_views(graph)
    starts = {node.pending.name: node for node in graph.nodes if isinstance(node, Start)}
    found: dict[str, Place] = {}
    for item in graph.inputs:
        if isinstance(item, Value):
            found[item.name] = _slot(plan, item)
    for node in graph.nodes:
        if isinstance(node, View):
            view = views[node.out.name]
            if view is None:
                raise CompilerBug(f"{graph.name}: view {node.out.name} is not a strided alias of {node.base}")
            base = found[view.base]
            offset = as_size(base.offset + view.offset * base.dtype.itemsize)
            dtype = node.out.dtype
            found[node.out.name] = replace(base, offset=offset, dtype=dtype, shape=view.shape, stride=view.stride)
            continue
        continued = _continued(node, starts)
        values = node.pending.results if isinstance(node, Start) and not node.pending.in_place else node.defs
        for value in values:
            if not isinstance(value, Value):
                continue
            if value.name in continued:
                found[value.name] = _same_memory(value, found[continued[value.name]])
            elif isinstance(node, Extern) and _is_alias(node, value):
                found[value.name] = Place(value.name, 0, value.dtype, value.shape, value.stride, value.device)
            else:
                found[value.name] = _slot(plan, value)
    return found


def _continued(node: Node, starts: dict[str, Start]) -> dict[str, str]:
    """Results that are the next version of a whole operand: the operand's memory, at the operand's address."""
    if isinstance(node, Kernel):
        pairs = zip((out.name for out in node.outs), node.targets or (None,) * len(node.outs), strict=True)
        return {out: target for out, target in pairs if target is not None}
    if isinstance(node, Extern):
        return dict(zip((v.name for v in node.versions), node.writes, strict=True))
    if isinstance(node, Wait):
        start = starts[node.pending]
        if start.pending.in_place:
            return dict(zip((out.name for out in node.outs), start.sources, strict=True))
    return {}


def _is_alias(node: Extern, value: Value) -> bool:
    return any(out is value and alias is not None for out, alias in zip(node.outs, node.aliases, strict=False))


def _same_memory(value: Value, place: Place) -> Place:
    same_shape = tuple(value.shape) == tuple(place.shape)
    stride = place.stride if same_shape else value.stride
    return replace(place, dtype=value.dtype, shape=value.shape, stride=stride)


def _slot(plan: Plan, value: Value) -> Place:
    slot = plan.slots.get(value.name)
    if slot is None or slot.storage not in plan.storages:
        raise CompilerBug(f"{plan.graph.name}: {value.name} has no place")
    storage = plan.storages[slot.storage]
    if storage.home in PARTS:
        offset = as_size((storage.arena_offset or 0) + slot.offset)
        return Place(None, offset, value.dtype, value.shape, value.stride, storage.device, storage.arena)
    return Place(storage.name, slot.offset, value.dtype, value.shape, value.stride, storage.device)
