"""From the text of a graph to a running program, for tests of host programs and of the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcompile.analyse.verify import verify
from dcompile.codegen.cpp import CppModule, print_cpp
from dcompile.codegen.wrapper import print_host
from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Pointwise, Reduction, Store
from dcompile.plan import Plan
from dcompile.runtime.comm import Communicator
from dcompile.runtime.program import Executable
from dcompile.runtime.timeline import Recorder
from dcompile.runtime.toolchain import compile_shared, load_functions
from dcompile.schedule.fuse import fuse
from dcompile.schedule.memory import plan_memory
from tests.unit.schedule.passes import context


def plan_of(graph: Graph | str) -> Plan:
    """A verified plan that keeps the order of ``graph``, whose loops are fused if they are not yet."""
    if isinstance(graph, str):
        graph = parse_graph(graph)
    ctx = context()
    if any(isinstance(node, Pointwise | Reduction | Store) for node in graph.nodes):
        graph = fuse(graph.check(), ctx)
    plan = plan_memory(graph.check(), ctx)
    verify(plan)
    return plan


def host_of(plan: Plan, timeline: bool = False) -> tuple[str, CppModule]:
    module = print_cpp(plan.graph)
    return print_host(plan, module, timeline=timeline), module


_compiled: dict[str, Path] = {}


def functions_of(module: CppModule) -> Mapping[str, Any]:
    """Its compiled functions; the same text is compiled once a process."""
    if not module.signatures:
        return {}
    if module.source not in _compiled:
        library = Path(tempfile.mkdtemp(prefix="dcompile-test-")) / "kernels.so"
        compile_shared(module.source, library)
        _compiled[module.source] = library
    return load_functions(_compiled[module.source], module.signatures)


def program(
    graph: Graph | str | Plan, communicator: Communicator | None = None, recorder: Recorder | None = None
) -> Executable:
    """``graph`` compiled and loaded."""
    plan = graph if isinstance(graph, Plan) else plan_of(graph)
    source, module = host_of(plan, timeline=recorder is not None)
    return Executable(source, plan.graph.name, functions_of(module), communicator, recorder)
