"""What is told of a finished program besides its text."""

from __future__ import annotations

from collections import Counter
from functools import partial

from dcompile.analyse.alias import storage_roots
from dcompile.codegen.cpp import CppModule
from dcompile.codegen.triton import TritonModule
from dcompile.collectives.fingerprint import communication_lines
from dcompile.collectives.nodes import Start
from dcompile.counters import TALLY
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import calls_programs
from dcompile.ir.symbolic import is_library_call, reads_numbers
from dcompile.ir.types import Value
from dcompile.pipeline.devices import devices
from dcompile.plan import Plan
from dcompile.runtime.compiled import Facts, Graphing
from dcompile.runtime.toolchain import Arity


def facts_of(plan: Plan, module: CppModule, gpu: TritonModule) -> Facts:
    externs = [node for node in plan.graph.nodes if is_library_call(node)]
    return Facts(
        functions={name: Arity(s.buffers, s.sizes) for name, s in module.signatures.items()},
        lines=communication_lines(plan.graph, partial(shared_place, plan)),
        launches=len(module.calls) + len(gpu.calls),
        library_calls=len(externs),
        collectives=sum(isinstance(node, Start) for node in plan.graph.nodes),
        fallbacks=Counter(node.op for node in externs if node.fallback),
        gpu_functions=len(gpu.signatures),
        graph_refusal=graph_refusal(plan.graph),
        written=written_inputs(plan.graph),
    )


def shared_place(plan: Plan, name: str) -> str:
    """Where a value lies that other ranks write: bytes from the first of a block of so many."""
    slot = plan.slots[name]
    storage = plan.storages[slot.storage]
    return f"byte {(storage.arena_offset or 0) + slot.offset} of {plan.arena_bytes[storage.arena]}"


def graph_refusal(graph: Graph) -> str:
    """Why a program cannot be replayed as a CUDA graph; "" if nothing is known against it."""
    if devices(graph) != {"cuda"}:
        return "tensors on the CPU"
    if graph.size_hints:
        return "sizes that are not known before the call"
    if any(isinstance(node, Start) for node in graph.nodes):
        return "collectives"
    if any(reads_numbers(node) or calls_programs(node) for node in graph.nodes):
        return "numbers that the program reads while it runs"
    return ""


def written_inputs(graph: Graph) -> tuple[int, ...]:
    """Positions of the inputs whose memory some node writes."""
    roots = storage_roots(graph)
    written = {roots[name] for node in graph.nodes for name in node.mutates}
    return tuple(n for n, item in enumerate(graph.inputs) if isinstance(item, Value) and roots[item.name] in written)


def count(facts: Facts, graphing: Graphing | None, hits: int = 0, misses: int = 0) -> None:
    TALLY.add(
        kernels=len(facts.functions) + facts.gpu_functions,
        kernel_launches=facts.launches,
        library_calls=facts.library_calls,
        collectives=facts.collectives,
        cache_hits=hits,
        cache_misses=misses,
    )
    TALLY.add_fallbacks(facts.fallbacks)
    if graphing is not None and facts.graph_refusal and facts.gpu_functions:
        TALLY.add_fallbacks(Counter({f"no CUDA graph: {facts.graph_refusal}": 1}))
