"""Random programs that write through overlapping views, random orders of them, and what makes an order harmless."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from dcompile.analyse.alias import Footprint, footprints
from dcompile.analyse.dependence import is_legal
from dcompile.collectives.nodes import Start, Wait
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, View

LENGTH = 8
"""Elements of each input."""


def overlapping_program(rng: random.Random, steps: int) -> Graph:
    """Library calls, launches and waits on two inputs and on views of them that overlap. Legal in its own order; a name
    is not read after it or what it is a view of has a newer version, but a base is after a write through a view."""
    lines: list[str] = []
    sizes = {"x": (LENGTH, 1), "y": (LENGTH, 1)}
    chain: dict[str, str] = {}
    flying: dict[str, Result] = {}
    for n in range(steps):
        size_before, chain_before, flying_before = dict(sizes), dict(chain), dict(flying)
        line = _line(rng, n, sizes, chain, flying)
        if line is None:
            continue
        graph = _parse([*lines, line], flying)
        if is_legal(graph, range(len(graph.nodes))):
            lines.append(line)
        else:  # it touches a buffer in flight
            sizes, chain, flying = size_before, chain_before, flying_before
    kept = rng.sample(sorted(sizes), min(2, len(sizes)))
    return _parse(lines, flying, kept)


Result = tuple[str, int, int]
"""Name, size and stride of what a collective gives."""


def _wait(pending: str, result: Result) -> str:
    name, size, stride = result
    return f"{name}: f32[{size}]{{{stride}}} = wait {pending}"


def _parse(lines: list[str], flying: dict[str, Result], kept: Sequence[str] = ()) -> Graph:
    body = "\n".join([*lines, *(_wait(pending, result) for pending, result in flying.items())])
    returns = ", ".join(f"%{name}" for name in kept)
    return parse_graph(f"graph g(x: f32[{LENGTH}], y: f32[{LENGTH}]) {{\n{body}\nreturn {returns}\n}}").check()


def _line(
    rng: random.Random,
    n: int,
    sizes: dict[str, tuple[int, int]],
    chain: dict[str, str],
    flying: dict[str, Result],
) -> str | None:
    """One more step; the tables are brought up to date: size and stride by name, the base of each view, waits due."""
    name = rng.choice(sorted(sizes)) if sizes else ""
    kind = rng.choice(
        ("view", "view", "view", "write", "write", "add", "read", "read", "start", "gather", "wait", "say")
    )
    if kind == "wait" and flying:
        pending = rng.choice(sorted(flying))
        result = flying.pop(pending)
        sizes[result[0]] = result[1:]
        return _wait(pending, result)
    if not name or kind == "wait":
        return None
    size, stride = sizes[name]
    if kind == "view":
        step = rng.choice((1, 1, 2)) if size > 2 else 1
        length = rng.randint(1, (size + step - 1) // step)
        offset = rng.randint(0, size - (length - 1) * step - 1)
        sizes[f"v{n}"], chain[f"v{n}"] = (length, step * stride), name
        return f"v{n}: f32[{length}]{{{step * stride}}} = view {name} (i0: {length}) -> [i0 * {step} + {offset}]"
    if kind == "read":
        sizes[f"t{n}"] = size, 1
        return f"t{n}: f32[{size}] = extern aten.relu.default(%{name})"
    if kind == "say":
        sizes[f"e{n}"] = size, 1
        return f"e{n}: f32[{size}] = extern aten.neg.default(%{name}) {rng.choice(('effect', 'effect', 'barrier'))}"
    if kind == "gather":
        flying[f"p{n}"] = f"r{n}", 2 * size, 1
        return f"p{n}: pending (r{n}: f32[{2 * size}]) = start all_gather ({name}) @g0[2]"
    fitting = sorted(other for other, (length, _) in sizes.items() if length == size and other != name)
    _retire(name, sizes, chain)
    if kind == "start":
        flying[f"p{n}"] = f"r{n}", size, stride
        return f"p{n}: pending in place (r{n}: f32[{size}]{{{stride}}}) = start all_reduce.sum ({name}) @g0[2]"
    call = f"aten.add_.Tensor(%{name}, %{rng.choice(fitting)})" if kind == "add" and fitting else (
        f"aten.mul_.Tensor(%{name}, 0.5)"
    )  # fmt: skip
    sizes[f"w{n}"] = size, stride
    return f"extern {call} writes ({name}) versions (w{n}: f32[{size}]{{{stride}}})"


def _retire(name: str, sizes: dict[str, tuple[int, int]], chain: dict[str, str]) -> None:
    """``name`` and its views are not read any more."""
    gone = {name}
    for view, base in chain.items():  # in order of definition
        if base in gone:
            gone.add(view)
    for old in gone:
        sizes.pop(old, None)


def any_order(graph: Graph, rng: random.Random) -> list[int]:
    """A random order in which names are defined before their use, and nothing else is certain."""
    waiting = {
        at: {graph.producer[name] for name in node.operands if name in graph.producer}
        for at, node in enumerate(graph.nodes)
    }
    order: list[int] = []
    while waiting:
        ready = [at for at, before in waiting.items() if not before]
        # mostly the next one in program order, so that few dependences break at a time
        order.append(ready[0] if rng.random() < 0.7 else rng.choice(ready))
        del waiting[order[-1]]
        for before in waiting.values():
            before.discard(order[-1])
    return order


def is_harmless(graph: Graph, order: Sequence[int]) -> bool:
    """Whether no two accesses to a common byte, of which one writes, change places, nothing touches what a collective
    in flight forbids, and launches, effects and barriers keep theirs. By brute force, pair by pair."""
    prints = footprints(graph)
    place = {position: n for n, position in enumerate(order)}
    accesses = [_accesses(node, prints) for node in graph.nodes]
    for first, second in combinations(range(len(graph.nodes)), 2):
        if place[first] > place[second] and (
            _conflict(accesses[first], accesses[second]) or _in_sequence(graph.nodes[first], graph.nodes[second])
        ):
            return False
    for at, node in enumerate(graph.nodes):
        if isinstance(node, Wait):
            start = graph.nodes[graph.producer[node.pending]]
            assert isinstance(start, Start)
            held = _held(start, prints)
            between = order[place[graph.producer[node.pending]] + 1 : place[at]]
            if any(_conflict(held, accesses[other]) for other in between):
                return False
    return True


Accesses = tuple[list[Footprint], list[Footprint]]
"""What a step reads and what it writes."""


def _accesses(node: Node, prints: dict[str, Footprint]) -> Accesses:
    if isinstance(node, View | Wait):
        return [], []
    fresh = node.pending.results if isinstance(node, Start) and not node.pending.in_place else ()
    made = [prints[item.name] for item in (*node.defs, *fresh) if item.name in prints]
    return [prints[name] for name in node.operands], [*made, *(prints[name] for name in node.mutates)]


def _held(start: Start, prints: dict[str, Footprint]) -> Accesses:
    sources = [prints[name] for name in start.sources]
    results = sources if start.pending.in_place else [prints[result.name] for result in start.pending.results]
    return sources, results


def _conflict(a: Accesses, b: Accesses) -> bool:
    pairs = [(mine, theirs) for mine in a[1] for theirs in (*b[0], *b[1])] + [(r, w) for r in a[0] for w in b[1]]
    return any(
        mine.overlaps(theirs) and mine.start != mine.stop and theirs.start != theirs.stop for mine, theirs in pairs
    )


def _in_sequence(first: Node, second: Node) -> bool:
    if isinstance(first, Start) and isinstance(second, Start):
        return first.group.label == second.group.label
    loud = [isinstance(node, Extern) and (node.effect or node.barrier) for node in (first, second)]
    return all(loud) or any(isinstance(node, Extern) and node.barrier for node in (first, second))
