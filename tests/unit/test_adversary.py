"""Generated programs under an adversarial communicator: random graphs, random legal schedules, eager's numbers.

The reference interpreter says what each rank must compute. The programs run compiled, one thread a rank, with a
communicator that poisons and watches every buffer in flight.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcompile.analyse.dependence import predecessors
from dcompile.analyse.verify import verify
from dcompile.codegen.cpp import CppModule, print_cpp
from dcompile.codegen.wrapper import print_host
from dcompile.ir.graph import Graph
from dcompile.pipeline import PASSES, Level
from dcompile.reference import run_reference
from dcompile.runtime.program import Executable
from dcompile.runtime.toolchain import compile_shared, load_functions
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.order import reorder
from tests.adversary import World
from tests.strategies import GROUP, assert_same, copy_inputs, graphs, random_inputs
from tests.unit.schedule.passes import context

ORDERS = 6
"""Schedules tried for each program; compiling its kernels is the slow part and is done once."""


def random_order(graph: Graph, seed: int) -> list[int]:
    """A random order that respects every dependence."""
    draw, before = random.Random(seed), predecessors(graph)
    waiting = {n: set(b) for n, b in enumerate(before)}
    order: list[int] = []
    while waiting:
        chosen = draw.choice([n for n, b in waiting.items() if not b])
        del waiting[chosen]
        order.append(chosen)
        for b in waiting.values():
            b.discard(chosen)
    return order


def to_kernels(graph: Graph) -> Graph:
    ctx = context()
    for step in PASSES:
        if step.takes is Level.LOOPS:
            graph = step.run(graph, ctx)
    return graph.check()


def run_ranks(graph: Graph, module: CppModule, functions: dict[str, Any], inputs: list[Any]) -> list[Any]:
    """The program on all ranks at once, each in a thread of its own with its own communicator."""
    plan = plan_memory(graph, context())
    verify(plan)
    host = print_host(plan, module, "program")
    world = World(programs=GROUP.size)
    programs = [Executable(host, f"rank{r}", functions, world.comm(r)) for r in range(GROUP.size)]
    return world.run([partial(programs[r], list(inputs[r])) for r in range(GROUP.size)])


def check_schedules(graph: Graph, seed: int, folder: Path) -> None:
    kernels = to_kernels(graph)
    module = print_cpp(kernels)
    functions: dict[str, Any] = {}
    if module.signatures:
        library = folder / f"{abs(hash(module.source)):x}.so"
        compile_shared(module.source, library)
        functions = load_functions(library, module.signatures)
    inputs = random_inputs(graph, GROUP.size)
    expected_inputs = copy_inputs(inputs)
    expected = run_reference([graph] * GROUP.size, expected_inputs)
    for n in range(ORDERS):
        order = random_order(kernels, seed + n) if n else list(range(len(kernels.nodes)))
        calls = {order.index(position): call for position, call in module.calls.items()}
        mine = copy_inputs(inputs)
        results = run_ranks(reorder(kernels, order), replace(module, calls=calls), functions, mine)
        assert_same(results, expected)
        assert_same(mine, expected_inputs)


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=10, **COMMON)
@given(graph=graphs(max_nodes=12), seed=st.integers(0, 2**20))
def test_random_schedules_survive_the_adversary(graph: Graph, seed: int, tmp_path: Path) -> None:
    check_schedules(graph, seed, tmp_path)


@pytest.mark.slow
@settings(max_examples=150, **COMMON)
@given(graph=graphs(max_nodes=24), seed=st.integers(0, 2**20))
def test_many_random_schedules_survive_the_adversary(graph: Graph, seed: int, tmp_path: Path) -> None:
    check_schedules(graph, seed, tmp_path)
