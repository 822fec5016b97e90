"""The compiler: a table of passes, and the way of a captured graph through it. Only this package imports all stages."""

from dcompile.pipeline.facts import graph_refusal, written_inputs
from dcompile.pipeline.memory import ProgramMemory, memory_for
from dcompile.pipeline.passes import PASSES, Level, Pass, run_passes
from dcompile.pipeline.program import Built, Kernels, compile_graph, programs_of

__all__ = [
    "PASSES",
    "Built",
    "Kernels",
    "Level",
    "Pass",
    "ProgramMemory",
    "compile_graph",
    "graph_refusal",
    "memory_for",
    "programs_of",
    "run_passes",
    "written_inputs",
]
