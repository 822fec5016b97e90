"""Runs library calls that were exported as JSON (``codegen.calls``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dcompile.errors import DCompileError
from dcompile.runtime.externs import resolve_op


def replay(text: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the calls in order.

    Args:
        tensors: by name, all that the calls take and do not make themselves.

    Returns:
        those and everything the calls have made, by name.

    Raises:
        DCompileError: a tensor that is neither given nor made before, or a size that is not a number.
    """
    known = dict(tensors)
    for call in json.loads(text):
        args = [_value(arg, known) for arg in call["args"]]
        kwargs = {name: _value(arg, known) for name, arg in call["kwargs"].items()}
        returned = resolve_op(call["op"])(*args, **kwargs)
        results = _flat(returned) if call["returns"] in ("list", "tuple") else [returned]
        known.update({name: result for name, result in zip(call["outputs"], results, strict=False) if name is not None})
        known.update({version: known[written] for written, version in call["writes"].items()})
    return known


def _flat(returned: Any) -> list[Any]:
    return [leaf for item in returned for leaf in (_flat(item) if isinstance(item, list | tuple) else [item])]


def _value(arg: Any, known: Mapping[str, Tensor]) -> Any:
    if isinstance(arg, list):
        return [_value(item, known) for item in arg]
    if not isinstance(arg, dict):
        return arg
    if "tensor" in arg:
        if arg["tensor"] not in known:
            raise DCompileError(f"a call takes {arg['tensor']}, which is neither given nor made before")
        found = known[arg["tensor"]]
        return found.item() if arg.get("item") else found
    if "float" in arg:
        return float(arg["float"])
    if "device" in arg:
        return torch.device(arg["device"])
    if "size" in arg:
        raise DCompileError(f"a call takes the size {arg['size']}; export a program of fixed sizes")
    ((_, name),) = arg.items()
    return getattr(torch, name)
