"""What eager rejects although it can be traced: AOTAutograd turns writes into values and loses what was wrong."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from dcompile.capture.origins import source_of
from dcompile.errors import Unsupported
from dcompile.ir.types import Origin

IN_PLACE_OPERATORS = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
        operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    }
)  # fmt: skip
"""Those of Python that write into their first operand."""

NO_WRITES = frozenset(
    {
        "as_strided_", "detach_", "index_put_", "requires_grad_", "rename_", "resize_", "resize_as_", "set_",
        "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_",
    }
)  # fmt: skip
"""Methods that change what a tensor is and not what it holds; and ``index_put_``, which eager lets write anywhere."""

UNCONVERTED = frozenset({torch.aminmax, torch.complex})
"""Functions that do not convert their results to the type of ``out``."""


def reject(gm: fx.GraphModule) -> None:
    """Look at every call of Dynamo's graph that writes.

    Raises:
        Unsupported: it writes to a tensor of which several elements share memory, or converts into ``out`` what eager
            does not convert. Eager raises a RuntimeError too.
    """
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for value in _written(node):
                if _overlaps(value):
                    raise Unsupported(
                        Origin((str(node.target),), source_of(node)),
                        f"writing in place ({_name(node.target)}) to a tensor of which several elements share memory",
                        "write to a .clone() of it",
                    )
            if node.target in UNCONVERTED and node.kwargs.get("out") is not None:
                _check_out(node)


def _written(node: fx.Node) -> Iterator[torch.Tensor]:
    """The tensors whose elements ``node`` writes in place."""
    name = _name(node.target)
    named_so = name.endswith("_") and not name.endswith("__") and name not in NO_WRITES
    if node.op not in ("call_function", "call_method") or not node.args:
        return
    if named_so or (node.op == "call_function" and node.target in IN_PLACE_OPERATORS):
        value = _example(node.args[0])
        if isinstance(value, torch.Tensor):
            yield value


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _overlaps(value: torch.Tensor) -> bool:
    """Whether elements share memory: a dimension of stride 0 has several. Sizes 0 and 1 are never symbols."""
    if value.layout is not torch.strided:
        return False
    pairs = zip(value.shape, value.stride(), strict=True)
    return any(type(step) is int and step == 0 and (type(n) is not int or n > 1) for n, step in pairs)


def _check_out(node: fx.Node) -> None:
    given = pytree.tree_leaves(fx.map_arg(node.kwargs["out"], _example))
    rest = {name: value for name, value in node.kwargs.items() if name != "out"}
    args, kwargs = fx.map_arg(node.args, _example), fx.map_arg(rest, _example)
    mode = next((value.fake_mode for value in given if hasattr(value, "fake_mode")), None)
    if mode is None:
        return
    with mode:
        made = pytree.tree_leaves(node.target(*args, **kwargs))  # type: ignore[operator]
    for value, into in zip(made, given, strict=True):
        if value.dtype is not into.dtype:
            raise Unsupported(
                Origin((str(node.target),), source_of(node)),
                f"{_name(node.target)} with a result of {value.dtype} and an out of {into.dtype}",
                f"pass a tensor of {value.dtype} as out",
            )


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node
