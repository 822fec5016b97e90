"""Hand-made plans: a program as text, and a place for every tensor in it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from dcompile.analyse.alias import shared_storage, storage_roots, strided_views
from dcompile.analyse.verify import verify
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import parse_graph
from dcompile.errors import UnsafePlan
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern
from dcompile.ir.types import Value
from dcompile.plan import Home, Plan, Slot, Storage


def make(
    text: str,
    arena: Mapping[str, int] | None = None,
    slots: Mapping[str, Slot] | None = None,
    frees: Mapping[int, tuple[str, ...]] | None = None,
) -> Plan:
    """A plan of ``text``: inputs are the caller's, storages named in ``arena`` begin there, all others are FRESH
    (LIBRARY for library calls that allocate). ``slots`` overrides places, whose storages then need no own."""
    graph = parse_graph(text)
    arena, slots = dict(arena or {}), dict(slots or {})
    roots, views = storage_roots(graph), strided_views(graph)
    library = {
        o.name for n in graph.nodes if isinstance(n, Extern) and n.out_op is None for o in n.outs if o is not None
    }
    tensors = {name: value for name, value in graph.defs.items() if isinstance(value, Value)}
    storages: dict[str, Storage] = {}
    places: dict[str, Slot] = {}
    for name, value in tensors.items():
        root = roots[name]
        if root == name and name not in slots:
            home = Home.INPUT if name in graph.input_names else Home.LIBRARY if name in library else Home.FRESH
            home = Home.ARENA if name in arena else home
            storages[name] = Storage(name, home, value.nbytes, value.device, arena.get(name))
        view = views.get(name)
        own = places[root] if root in places else Slot(root)
        if view is not None:
            below = places[view.base]
            own = Slot(below.storage, below.offset + view.offset * value.dtype.itemsize)
        elif root != name:
            own = next(places[shared] for shared in _shares(graph, name))
        places[name] = slots.get(name, own)
    ends = {s.device: 0 for s in storages.values()}
    for storage in storages.values():
        if storage.arena_offset is not None and isinstance(storage.nbytes, int):
            ends[storage.device] = max(ends[storage.device], storage.arena_offset + storage.nbytes)
    return Plan(graph, places, storages, frees or {}, ends, sum(ends.values()))


def _shares(graph: Graph, name: str) -> list[str]:
    starts = {node.pending.name: node for node in graph.nodes if isinstance(node, Start)}
    found = [s for node in graph.nodes for n, s in shared_storage(node, starts) if n == name and s is not None]
    assert found, name
    return found


def broken(plan: Plan, rule: str, *words: str, program: Graph | None = None) -> None:
    """``verify`` names exactly ``rule`` and every word."""
    with pytest.raises(UnsafePlan) as caught:
        verify(plan, program)
    message = str(caught.value)
    assert re.match(rf"{rule} at ", message), message
    for word in words:
        assert word in message, message


def kernel(out: str, source: str, n: int = 16, inplace: str = "", at: str = "") -> str:
    """One elementwise kernel."""
    pair = f" inplace ({out}: {inplace})" if inplace else ""
    line = f"  # aten.add @{at}" if at else ""
    write = f"write {out}[i0] = {source}[i0] + 1.0:f32"
    return f"{out}: f32[{n}] = kernel targets (_){pair} {{{line}\n nest (simd i0: {n}) {{\n {write}\n }}\n }}\n"


def store(out: str, target: str, source: str, n: int = 16) -> str:
    """One kernel that adds ``source`` into ``target``."""
    write = f"write add {out}[i0] = {source}[i0]"
    return f"{out}: f32[{n}] = kernel targets ({target}) {{\n nest (simd i0: {n}) {{\n {write}\n }}\n }}\n"


def program(*steps: str, returns: str, inputs: str = "x: f32[16], y: f32[16]") -> str:
    return (
        f"graph g({inputs}) {{\n"
        + "".join(step if step.endswith("\n") else step + "\n" for step in steps)
        + f"return {returns}\n}}\n"
    )
