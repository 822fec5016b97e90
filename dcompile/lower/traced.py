"""What fx nodes tell of their results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def main_device(gm: fx.GraphModule) -> str:
    """Where most of the program's tensors live: on the first device that holds one with dimensions."""
    for node in gm.graph.nodes:
        meta = node.meta.get("val")
        if isinstance(meta, torch.Tensor) and meta.dim() > 0:
            return meta.device.type
    return "cpu"


def is_number(meta: Any) -> bool:
    numbers = bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(meta, numbers) and not isinstance(meta, torch.Tensor)


def leaves(meta: Any) -> Iterator[Any]:
    if isinstance(meta, list | tuple):
        for item in meta:
            yield from leaves(item)
    else:
        yield meta
