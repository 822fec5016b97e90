"""Uniform numbers drawn ahead of simd loops are the ones the definition names, wherever a loop starts and ends."""

from __future__ import annotations

import pytest
import torch

from dcompile.codegen.cpp import print_cpp
from dcompile.codegen.cpp_draws import MAX_DRAWS, STRETCH
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Role, Write
from dcompile.reference.scalars import uniform
from tests.unit.codegen.kernels import F32, I0, I1, I64, R0, P, S, V, kernel_graph, run, value

SEEDS = torch.tensor([-(2**62) + 12345, 987654321, 5])


def drawn(offset: object, seed: int = 0) -> ex.Expr:
    return ex.op("rand", ex.load("seeds", (seed,), I64), ex.index(offset), dtype=F32)


def rows(count: int, length: int, roles: tuple[Role, ...], start: int = 0) -> Graph:
    at = I0 * length + I1
    nest = Nest(((I0, count), (I1, length)), roles, (Write("y", at, drawn(at + start)),))
    return kernel_graph([value("seeds", (3,), I64)], Kernel(outs=(value("y", (count, length)),), body=(nest,)))


@pytest.mark.parametrize("length", [1, 63, 64, 200, STRETCH, STRETCH + 1, 3 * STRETCH + 77])
@pytest.mark.parametrize("start", [0, 5, 2**40 + 17])
def test_rows(length: int, start: int) -> None:
    graph = rows(3, length, (P, V), start)
    assert "dc::draw(" in print_cpp(graph).source.split('extern "C"')[1]
    ((y,), codes) = run(graph, [SEEDS])
    assert codes == [0]
    assert torch.equal(y, uniform(SEEDS[0], torch.arange(3 * length) + start).view(3, length))


def test_serial_loops_and_other_steps_draw_one_by_one() -> None:
    for graph in (rows(5, 40, (S, S)), rows(5, 40, (V, S))):
        text = print_cpp(graph).source.split('extern "C"')[1]
        assert "dc::rand(" in text
        assert "dc::draw(" not in text
        ((y,), _) = run(graph, [SEEDS])
        assert torch.equal(y, uniform(SEEDS[0], torch.arange(200)).view(5, 40))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_loop_on_its_own(threads: int) -> None:
    count = 70_001
    body = Nest(((I0, count),), (V,), (Write("y", I0, drawn(I0, 1)),))
    graph = kernel_graph([value("seeds", (3,), I64)], Kernel(outs=(value("y", (count,)),), body=(body,)))
    ((y,), _) = run(graph, [SEEDS], threads)
    assert torch.equal(y, uniform(SEEDS[1], torch.arange(count)))


@pytest.mark.parametrize("length", [100, 9000])
def test_a_fold_that_draws(length: int) -> None:
    at = I0 * length + R0
    kept = ex.op("lt", drawn(at), ex.const(0.5, F32))
    lets = (Let("kept", ex.to(kept, F32)),)
    local = ex.local("kept", F32)
    fold = Fold(((R0, length),), (V,), (Accumulator("total", "sum", local),), lets, (Write("y", at, local),))
    body = Nest(((I0, 4),), (P,), (fold, Write("z", I0, ex.local("total", F32))))
    outs = (value("y", (4, length)), value("z", (4,)))
    ((y, z), _) = run(kernel_graph([value("seeds", (3,), I64)], Kernel(outs=outs, body=(body,))), [SEEDS])
    want = (uniform(SEEDS[0], torch.arange(4 * length)) < 0.5).float().view(4, length)
    assert torch.equal(y, want)
    torch.testing.assert_close(z, want.sum(1))


def test_more_streams_than_are_drawn_ahead() -> None:
    streams = MAX_DRAWS + 2
    writes = tuple(Write("y", I0 * streams + n, drawn(I0 + 1000 * n, n % 3)) for n in range(streams))
    graph = kernel_graph(
        [value("seeds", (3,), I64)],
        Kernel(outs=(value("y", (500, streams)),), body=(Nest(((I0, 500),), (V,), writes),)),
    )
    ((y,), _) = run(graph, [SEEDS])
    for n in range(streams):
        assert torch.equal(y[:, n], uniform(SEEDS[n % 3], torch.arange(500) + 1000 * n))
