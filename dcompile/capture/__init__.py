"""FX to FX: what ``torch.compile`` hands a backend becomes plain ATen graphs. The only home of private PyTorch APIs."""

from dcompile.capture.aot import Boxed, Captured, CompileGraph, GraphKind, capture, graph_breaks, reset_graph_breaks
from dcompile.capture.functional import group_names
from dcompile.capture.origins import source_of

__all__ = [
    "Boxed",
    "Captured",
    "CompileGraph",
    "GraphKind",
    "capture",
    "graph_breaks",
    "group_names",
    "reset_graph_breaks",
    "source_of",
]
