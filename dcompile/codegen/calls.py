"""The library calls of a program as JSON, for an executor that is not this one (``runtime.replay`` is the model of it).

A list in program order, each call ``{"op", "args", "kwargs", "returns", "outputs", "writes", "source"}``. A tensor is
``{"tensor": name}``, a dtype ``{"dtype": "float32"}``, a size that is not a number ``{"size": "2*u0"}``. ``returns`` is
``"nothing"``, ``"tensor"``, ``"list"`` (one list of tensors) or ``"tuple"`` (of tensors and lists of tensors).
"""

from __future__ import annotations

import json
import math
from typing import Any

import sympy
import torch

from dcompile.errors import Unsupported
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Arg, Extern, Literal, Ref
from dcompile.ir.symbolic import is_library_call
from dcompile.ir.text import print_index
from dcompile.ir.types import DType


def calls_json(graph: Graph) -> str:
    """The calls of ``graph``.

    Raises:
        Unsupported: a call that returns something else than tensors, or takes what JSON has no word for.
    """
    return json.dumps([_call(node) for node in graph.nodes if is_library_call(node)], indent=1)


def _call(node: Extern) -> dict[str, Any]:
    return {
        "op": node.op,
        "args": [_argument(node, arg) for arg in node.args],
        "kwargs": {name: _argument(node, arg) for name, arg in node.kwargs},
        "returns": _returns(node),
        "outputs": [None if out is None else out.name for out in node.outs],
        "writes": {name: version.name for name, version in zip(node.writes, node.versions, strict=True)},
        "source": node.origin.source,
    }


def _returns(node: Extern) -> str:
    if node.op.startswith("dcompile."):
        raise _refused(node, "which only this compiler's runtime knows")
    overload: Any = torch.ops
    for part in node.op.split("."):
        overload = getattr(overload, part)
    kinds = [str(item.type) for item in overload._schema.returns]
    if wrong := [kind for kind in kinds if kind not in ("Tensor", "List[Tensor]", "Optional[Tensor]")]:
        raise _refused(node, f"which returns {', '.join(wrong)}")
    if not kinds:
        return "nothing"
    if len(kinds) == 1:
        return "list" if kinds[0] == "List[Tensor]" else "tensor"
    return "tuple"


def _refused(node: Extern, why: str) -> Unsupported:
    return Unsupported(node.origin, f"the export of {node.op}, {why}", "export calls that return tensors")


def _argument(node: Extern, arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"tensor": arg.name, "item": True} if arg.item else {"tensor": arg.name}
    if isinstance(arg, Literal):
        if arg.kind not in ("dtype", "device", "memory_format", "layout"):
            raise _refused(node, f"which takes a {arg.kind}")
        known = arg.kind == "dtype" and arg.value in {d.value for d in DType}
        return {arg.kind: str(DType(arg.value).torch).removeprefix("torch.") if known else arg.value}
    if isinstance(arg, tuple):
        return [_argument(node, item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    if isinstance(arg, sympy.Expr):
        return {"size": print_index(arg)}
    return arg
