"""What pass tests share: a text graph before, a text graph after, and the reference interpreter as judge."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.types import Value
from dcompile.options import Options
from dcompile.reference import run_reference


def context(**options: object) -> Context:
    return Context(Options.from_env({"cache_dir": None, **options}), CostModel.analytical("cpu", 2))


def apply(run: Callable[[Graph, Context], Graph], text: str) -> str:
    """The text of ``run`` applied to the graph ``text``, without its origins."""
    return print_graph(run(parse_graph(text).check(), context()).check())


def same(text: str) -> str:
    """``text`` in the printer's own layout."""
    return print_graph(parse_graph(text))


def random_inputs(graph: Graph, seed: int = 0) -> list[torch.Tensor | int]:
    """Random tensors in the layouts of the graph's inputs; size inputs get their hints."""
    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor | int] = []
    for item in graph.inputs:
        if isinstance(item, SizeInput):
            found.append(item.hint)
            continue
        assert isinstance(item, Value)
        shape = tuple(int(n) for n in item.shape)
        if item.dtype.is_float:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(item.dtype.torch)
        else:
            values = torch.randint(0, 2, shape, generator=generator).to(item.dtype.torch)
        tensor = torch.empty_strided(shape, tuple(int(n) for n in item.stride), dtype=item.dtype.torch)
        found.append(tensor.copy_(values))
    return found


def assert_same_numbers(before: Graph, after: Graph, tolerance: float = 1e-6) -> None:
    """Both graphs give the same outputs, and leave the same in their inputs, for random inputs."""
    first, second = random_inputs(before), random_inputs(before)
    expected, found = run_reference([before], [first])[0], run_reference([after], [second])[0]
    for a, b in zip([*expected, *first], [*found, *second], strict=True):
        if isinstance(a, torch.Tensor):
            assert isinstance(b, torch.Tensor)
            assert a.shape == b.shape
            assert a.dtype is b.dtype
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert a == b
