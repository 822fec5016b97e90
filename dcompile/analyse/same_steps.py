"""Whether a plan runs the program's steps, and those that the outside can see in the program's order (V9, V13, V14)."""

from __future__ import annotations

from collections.abc import Iterator

from dcompile.analyse.contents import StepKey, step_keys
from dcompile.analyse.places import describe, unsafe
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern


def check_steps(graph: Graph, program: Graph) -> None:
    """Compare a plan's ``graph`` with the ``program`` it was ordered from.

    Raises:
        UnsafePlan: V14, V9 or V13, in this order.
    """
    _check_same_nodes(graph, program)
    _check_launch_order(graph, program)
    _check_effects(graph, program)


def _check_same_nodes(graph: Graph, program: Graph) -> None:
    if graph.inputs != program.inputs or graph.outputs != program.outputs:
        raise unsafe("V14", "the plan", "it takes or returns something else than the program")
    expected = dict(zip(step_keys(program), program.nodes, strict=True))
    for position, (key, node) in enumerate(zip(step_keys(graph), graph.nodes, strict=True)):
        if key not in expected:
            raise unsafe("V14", describe(node, position), "the program has no such step, or has it once less")
        original = expected.pop(key)
        if original is not node and original != node:
            raise unsafe("V14", describe(node, position), "the program has this step with other operands or results")
    for node in expected.values():
        names = ", ".join(item.name for item in node.defs) or ", ".join(node.operands)
        where = f" [{node.origin.source}]" if node.origin.source else ""
        raise unsafe("V14", "the plan", f"the program's {type(node).__name__} {names}{where} is missing")


def _check_launch_order(graph: Graph, program: Graph) -> None:
    expected, found = _launches(program), _launches(graph)
    for label in sorted(expected.keys() | found.keys()):
        before, now = expected.get(label, []), found.get(label, [])
        if before != now:
            raise unsafe("V9", "the plan", f"group {label} launches {', '.join(now)}; the program {', '.join(before)}")


def _launches(graph: Graph) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            found.setdefault(node.group.label, []).append(node.pending.name)
    return found


def _check_effects(graph: Graph, program: Graph) -> None:
    """V13: calls with effects in program order, every step between the same two barriers."""
    effects = iter(_effects(program))
    stretch = dict(_stretches(program))
    for position, (key, node) in enumerate(zip(step_keys(graph), graph.nodes, strict=True)):
        if isinstance(node, Extern) and (node.effect or node.barrier) and next(effects) != key:
            raise unsafe("V13", describe(node, position), "calls with effects are not in program order")
    for position, (key, now) in enumerate(_stretches(graph)):
        if now != stretch[key]:
            text = f"runs after {now} barriers, in the program after {stretch[key]}"
            raise unsafe("V13", describe(graph.nodes[position], position), text)


def _effects(graph: Graph) -> list[StepKey]:
    keyed = zip(step_keys(graph), graph.nodes, strict=True)
    return [key for key, node in keyed if isinstance(node, Extern) and (node.effect or node.barrier)]


def _stretches(graph: Graph) -> Iterator[tuple[StepKey, int]]:
    """For each step the number of barriers up to and with it."""
    barriers = 0
    for key, node in zip(step_keys(graph), graph.nodes, strict=True):
        barriers += isinstance(node, Extern) and node.barrier
        yield key, barriers


__all__ = ["check_steps"]
