"""Weights in the CPU library's own layouts, packed once and kept as long as the weight lives and does not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_kept: dict[int, tuple[weakref.ref[Tensor], int, dict[object, Tensor]]] = {}
"""By the identity of the weight: itself, its version, and its packed forms."""


def _packed(weight: Tensor, key: object, pack: Callable[[], Tensor]) -> Tensor:
    """A packed form of ``weight``: the kept one unless the weight has been written since."""
    identity = id(weight)
    held = _kept.get(identity)
    if held is None or held[0]() is not weight or held[1] != weight._version:
        held = _kept[identity] = (weakref.ref(weight, lambda _: _kept.pop(identity, None)), weight._version, {})
    forms = held[2]
    if key not in forms:
        forms[key] = pack()
    return forms[key]


def convolution(weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, shape: Sequence[int]) -> Tensor:
    """For ``mkldnn._convolution_pointwise`` of images of ``shape``."""
    key = ("convolution", *map(tuple, (padding, stride, dilation, shape)), groups)
    args = (list(padding), list(stride), list(dilation), groups, list(shape))
    return _packed(weight, key, lambda: torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *args))


def convolution_transpose(
    weight: Tensor, padding: Any, out_padding: Any, stride: Any, dilation: Any, groups: int, shape: Sequence[int]
) -> Tensor:
    """For ``mkldnn._convolution_transpose_pointwise`` of images of ``shape``."""
    key = ("transpose", *map(tuple, (padding, out_padding, stride, dilation, shape)), groups)
    args = (list(padding), list(out_padding), list(stride), list(dilation), groups, list(shape))
    return _packed(weight, key, lambda: torch.ops.mkldnn._reorder_convolution_transpose_weight(weight.detach(), *args))


def linear(weight: Tensor, rows: int) -> Tensor:
    """For ``mkldnn._linear_pointwise`` of ``rows`` rows; ``weight`` is (out, in)."""
    return _packed(weight, ("linear", rows), lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))


def mkl_linear(weight: Tensor, rows: int) -> Tensor:
    """For ``mkl._mkl_linear`` of ``rows`` rows; ``weight`` is (out, in)."""
    return _packed(weight, ("mkl", rows), lambda: torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows))


PACKING: dict[str, Callable[..., Tensor]] = {
    "dcompile.pack_convolution": convolution,
    "dcompile.pack_convolution_transpose": convolution_transpose,
    "dcompile.pack_linear": linear,
    "dcompile.pack_mkl_linear": mkl_linear,
}
