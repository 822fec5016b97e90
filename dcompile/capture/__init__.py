"""FX to FX: what ``torch.compile`` hands a backend becomes plain ATen graphs. The only home of private PyTorch APIs."""

from dcompile.capture.aot import (
    Captured,
    CompileGraph,
    GraphKind,
    capture,
    every_recompile,
    graph_breaks,
    reset_graph_breaks,
    tensors_in,
)
from dcompile.capture.identity import Unsuited
from dcompile.capture.memory import Boxed, Memory
from dcompile.capture.origins import source_of
from dcompile.capture.storage import storage_users, tensor_users
from dcompile.capture.under_ddp import (
    is_forward_of,
    is_whole_function,
    keep_whole,
    parameter_inputs,
    pass_through,
)

__all__ = [
    "Boxed",
    "Captured",
    "CompileGraph",
    "GraphKind",
    "Memory",
    "Unsuited",
    "capture",
    "every_recompile",
    "graph_breaks",
    "is_forward_of",
    "is_whole_function",
    "keep_whole",
    "parameter_inputs",
    "pass_through",
    "reset_graph_breaks",
    "source_of",
    "storage_users",
    "tensor_users",
    "tensors_in",
]
