"""What a backend can know of the DistributedDataParallel around the program it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

RESUMED = "torch_dynamo_resume_in"
"""How Dynamo names the functions it makes of what follows a graph break."""


def is_whole_function(gm: fx.GraphModule) -> bool:
    """Whether ``gm`` is all of a user's function: nothing of it ran before, or runs behind, outside the graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    code = _code_being_compiled()
    return bool(
        reason is not None and not reason.graph_break and code is not None and not code.co_name.startswith(RESUMED)
    )


def is_forward_of(module: nn.Module) -> bool:
    """Whether the function being compiled is the forward pass of ``module`` itself, not of a part of it."""
    module = getattr(module, "_orig_mod", module)
    code = _code_being_compiled()
    forward = getattr(type(module).forward, "__code__", None)
    return code is not None and (code is forward or code.co_filename.endswith("_dynamo/external_utils.py"))


def _code_being_compiled() -> Any:
    """The code object Dynamo is translating on this thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and frame.f_code.co_filename.endswith("convert_frame.py"):
            return frame.f_locals.get("code")
        frame = frame.f_back
    return None


def parameter_inputs(gm: fx.GraphModule) -> dict[nn.Parameter, fx.Node]:
    """The inputs of Dynamo's graph that are parameters."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = getattr(node.meta.get("grapharg"), "example", None)
            if isinstance(example, nn.Parameter):
                found[example] = node
    return found


def pass_through(gm: fx.GraphModule, inputs: set[str], function: Callable[..., torch.Tensor], *arguments: Any) -> None:
    """Let ``gm`` use ``function(x, *arguments)`` wherever it uses one of its ``inputs`` ``x``, in place."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        if node.name in inputs:
            with gm.graph.inserting_after(placeholders[-1]):
                through = gm.graph.call_function(function, (node, *arguments))
            through.meta = {key: node.meta[key] for key in ("example_value", "stack_trace") if key in node.meta}
            node.replace_all_uses_with(through, delete_user_cb=lambda user, mine=through: user is not mine)
    gm.recompile()


def keep_whole(is_ours: Callable[[Any], bool]) -> None:
    """From now on Dynamo hands programs under DistributedDataParallel to our backend in one piece.

    Its optimizer for such programs cuts them at the reducer's buckets, so that hooks can communicate between the
    pieces. Other backends keep that.

    Args:
        is_ours: whether a backend, as ``torch.compile`` was given it, is ours.
    """
    from torch._dynamo.backends import distributed

    optimizer: Any = getattr(distributed, "DDPOptimizer", None)
    if optimizer is None or getattr(optimizer.compile_fn, "keeps_whole", False):
        return
    cut = optimizer.compile_fn

    def compile_fn(self: Any, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        if is_ours(self.backend_compile_fn):
            return self.backend_compile_fn(gm, example_inputs)
        return cut(self, gm, example_inputs)

    compile_fn.keeps_whole = True  # type: ignore[attr-defined]
    optimizer.compile_fn = compile_fn
