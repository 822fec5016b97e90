"""Refusing, with the user's line, what no later stage has a place for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dcompile.capture.origins import source_of
from dcompile.errors import Unsupported
from dcompile.ir.types import DType, Origin

_DEVICES = ("cpu", "cuda")


def check(gm: fx.GraphModule) -> None:
    """Look at every tensor of ``gm``.

    Raises:
        Unsupported: an element type, layout or device without support, or two devices of one type in one graph. CPU and
            GPU may meet: copies between them are steps of the program.
    """
    seen: dict[str, torch.device] = {}
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    given = {value.device for node in inputs for value in _tensors(node.meta.get("val"))}
    for node in gm.graph.nodes:
        for value in _tensors(node.meta.get("val")):
            _check_tensor(node, value)
            device = value.device
            if seen.setdefault(device.type, device) != device:
                raise Unsupported(
                    _origin(node),
                    f"one graph with tensors on {seen[device.type]} and on {device} ({node.name})",
                    f"move the tensors to {seen[device.type]} first, or compile each device's part by itself",
                )
            if device.type == "cuda" and device not in given and device.index not in (None, _current_gpu()):
                raise Unsupported(
                    _origin(node),
                    f"a tensor made on {device} ({node.name}) while the current device is cuda:{_current_gpu()}",
                    f"call torch.cuda.set_device({device.index}) before, or pass a tensor on {device}",
                )


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _check_tensor(node: fx.Node, value: torch.Tensor) -> None:
    where = f"an input ({node.target})" if node.op == "placeholder" else f"a result of {node.target}"
    if value.layout is not torch.strided:
        raise Unsupported(
            _origin(node), f"{where} of layout {value.layout}", "call .to_dense() before the compiled function"
        )
    if value.is_quantized:
        raise Unsupported(
            _origin(node), f"{where} of quantised type {value.dtype}", "call .dequantize() before the compiled function"
        )
    if DType.of(value.dtype) is None:
        raise Unsupported(
            _origin(node),
            f"{where} of element type {value.dtype}",
            "convert it to a standard type such as torch.bfloat16, or keep this code eager with torch.compiler.disable",
        )
    if value.device.type not in _DEVICES:
        raise Unsupported(
            _origin(node), f"{where} on device {value.device}", f"use one of the devices {', '.join(_DEVICES)}"
        )


def _origin(node: fx.Node) -> Origin:
    """The node's line; that of its first user with a known line if it has none (inputs)."""
    for candidate in (node, *node.users):
        if source := source_of(candidate):
            return Origin((str(node.target),), source)
    return Origin((str(node.target),))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
