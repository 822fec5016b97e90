"""Inputs for random programs, and the comparison of what programs return."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcompile.ir.graph import Graph, SizeInput, hint
from dcompile.ir.types import DType, Value


def random_inputs(graph: Graph, ranks: int, seed: int = 0) -> list[list[torch.Tensor | int]]:
    """Inputs for each rank, different between ranks except for sizes: standard normal floats, small integers.

    Sizes take their hints. Strides are those declared.
    """
    generator = torch.Generator().manual_seed(seed)
    return [[_random_input(item, graph, generator) for item in graph.inputs] for _ in range(ranks)]


def _random_input(item: Value | SizeInput, graph: Graph, generator: torch.Generator) -> torch.Tensor | int:
    if isinstance(item, SizeInput):
        return item.hint
    shape = tuple(hint(n, graph.size_hints) for n in item.shape)
    stride = tuple(hint(n, graph.size_hints) for n in item.stride)
    tensor = torch.empty_strided(shape, stride, dtype=item.dtype.torch)
    if item.dtype.is_float or item.dtype.is_complex:
        return tensor.copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
    low, high = (0, 2) if item.dtype is DType.BOOL else (0, 100)
    return tensor.copy_(torch.randint(low, high, shape, generator=generator))


def copy_inputs(inputs: Sequence[Sequence[torch.Tensor | int]]) -> list[list[torch.Tensor | int]]:
    """Copies with the same strides: programs mutate their inputs."""
    return [
        [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) if isinstance(x, torch.Tensor) else x
            for x in rank
        ]
        for rank in inputs
    ]


def assert_same(
    found: Sequence[Sequence[object]], expected: Sequence[Sequence[object]], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Equal results on every rank: tensors up to rounding (NaN equals NaN), everything else exactly."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, check_stride=False)
            else:
                assert a == b
