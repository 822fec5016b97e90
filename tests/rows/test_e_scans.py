"""Rows E: scans."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel, ScanLoop, statements
from dcompile.ir.nodes import Extern, Scan
from dcompile.lower import lower
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.scan_readers import fuse_scan_readers
from tests.rows.check import Seen, chk
from tests.unit.lower.harness import trace


def loops(seen: Seen) -> list[ScanLoop]:
    kernels = [node for node in seen.plan.graph.nodes if isinstance(node, Kernel)]
    return [s for kernel in kernels for s in statements(kernel.body) if isinstance(s, ScanLoop)]


@pytest.mark.row("E1")
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scans_along_every_dimension(dim: int) -> None:
    x = torch.randn(7, 300)
    seen = chk(lambda x: (x * 2).cumsum(dim), x, rtol=2e-6, atol=1e-6)
    assert (seen.K, seen.X, len(loops(seen))) == (1, 0, 1)

    def program(x: Tensor, n: Tensor, flags: Tensor) -> list[Tensor]:
        whole = [n.cumsum(dim), flags.cumsum(dim), n.cumprod(dim), *x.cummax(dim), *n.cummin(dim)]
        return [*whole, x.cumprod(dim) + 1, x.logcumsumexp(dim)]

    more = chk(program, x, torch.randint(-2, 3, (7, 300), dtype=torch.int32), x > 0)
    assert more.X == 0
    assert len(loops(more)) == 7
    assert [r.dtype for r in more.result[:2]] == [torch.int64, torch.int64]


@pytest.mark.row("E1")
def test_ties_nan_and_infinities() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([1.0, 3, 3, nan, 5, nan, 7])
    chk(lambda x: (*x.cummax(0), *x.cummin(0), x.cumsum(0)), x)
    y = torch.tensor([-inf, -inf, 1.0, 2.0, inf, inf, -inf])
    chk(lambda y: (y.logcumsumexp(0), *y.cummax(0)), y)
    sliced = torch.randn(6, 5, 8).transpose(0, 2)[1:]
    chk(lambda x: (x.cumsum(1), x.cumsum(0)), sliced, rtol=2e-6)


@pytest.mark.row("E1")
def test_gradients_and_changing_lengths() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    chk(lambda x: x.cumsum(1) * x, x, grad=True)
    seen = chk(lambda x: x.cumsum(0), torch.randn(30, 3), also=[(torch.randn(50, 3),)], dynamic=True)
    assert len(seen.graphs) == 1


@pytest.mark.row("E2")
def test_nothing_to_scan() -> None:
    def program(one: Tensor, none: Tensor, scalar: Tensor) -> list[Tensor]:
        return [one.cumsum(1), none.cumsum(0), scalar.cumsum(0), scalar.cumprod(0), *one.cummax(1), one.logcumsumexp(1)]

    seen = chk(program, torch.ones(3, 1), torch.empty(0), torch.tensor(2.0))
    assert seen.X == 0
    assert loops(seen) == []


@pytest.mark.row("E2")
def test_devices_without_a_scan_kernel_call_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(lambda x: x.cumsum(0), torch.randn(9))
    assert [type(n) for n in lower(traced, "inference").graph.nodes] == [Scan]
    monkeypatch.setattr("dcompile.lower.scan.SCAN_DEVICES", frozenset())
    (node,) = lower(traced, "inference").graph.nodes
    assert isinstance(node, Extern)
    assert (node.op, node.fallback) == ("aten.cumsum.default", False)


@pytest.mark.row("E1")
def test_long_sums_are_as_accurate_as_eager() -> None:
    x = torch.rand(200_000)
    seen = chk(lambda x: x.cumsum(0), x, rtol=1e-6)
    exact = x.double().cumsum(0)
    error = ((seen.result.double() - exact) / exact).abs().max()
    assert error <= ((x.cumsum(0).double() - exact) / exact).abs().max() * 1.5


def running_sum(rows: int, length: int, device: str, start: str = " from (0.0:f32)") -> Graph:
    """The kernels of a running sum along each row."""
    values = f"f32[{rows}, {length}]@{device}"
    scan = f"scan (i0: {rows}, i1: {length}) along i1 (x[i0, i1]) by (left0 + right0){start}"
    graph = parse_graph(f"graph f(x: {values}) {{\n  y: {values} = {scan}\n  return %y\n}}").check()
    costs = CostModel.analytical("cuda", 1)
    return fuse(graph, Context(Options.from_env({"cache_dir": None}), costs)).check()


@pytest.mark.row("E3")
def test_long_scans_of_few_rows_are_cut_into_tiles() -> None:
    clear, scan = running_sum(3, 1_000_003, "cuda").nodes
    assert isinstance(clear, Kernel)
    assert isinstance(scan, Kernel)
    (loop,) = (s for s in statements(scan.body) if isinstance(s, ScanLoop))
    assert loop.tiles is not None
    tiles = -(-1_000_003 // loop.tiles.length)
    assert tiles * 3 > 132
    (words,) = clear.outs
    assert words.shape == (1 + 2 * 3 * tiles,)
    assert scan.targets == (None, words.name)
    assert scan.mutates == (words.name,)
    assert loop.tiles.state == scan.outs[1].name


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("rows", "length", "device"), [(1, 16384, "cuda"), (1000, 100_000, "cuda"), (1, 1_000_003, "cpu")]
)
def test_scans_that_are_short_or_many_or_on_a_cpu_are_not_cut(rows: int, length: int, device: str) -> None:
    (scan,) = running_sum(rows, length, device).nodes
    assert isinstance(scan, Kernel)
    assert all(s.tiles is None for s in statements(scan.body) if isinstance(s, ScanLoop))


@pytest.mark.row("E3")
@pytest.mark.parametrize("start", ["", " from (0.0:f32)"])
def test_a_scan_in_tiles_is_the_same_scan(start: str) -> None:
    graph = running_sum(2, 20_000, "cuda", start)
    assert parse_graph(print_graph(graph)) == graph
    x = torch.rand(2, 20_000)
    (found,) = run_reference([graph], [[x]])[0]
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, x.cumsum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.row("E1")
@pytest.mark.parametrize("dim", [0, 1])
def test_elementwise_ops_around_a_scan_are_in_its_kernel(dim: int) -> None:
    x, y = torch.randn(7, 300), torch.randn(7, 300)
    seen = chk(lambda x, y: (x * 2).cumsum(dim).exp() + y, x, y, rtol=2e-5, atol=1e-5)
    assert (seen.K, seen.X, len(loops(seen))) == (1, 0, 1)
    kept = chk(lambda x, y: ((z := x.cumsum(dim)), z * y), x, y, rtol=2e-6, atol=1e-6)
    assert (kept.K, len(loops(kept))) == (1, 1)
    both = chk(lambda x: (m := x.cummax(dim)).values * m.indices, x)
    assert (both.K, len(loops(both))) == (1, 1)


@pytest.mark.row("E1")
def test_readers_at_other_positions_stay_apart() -> None:
    x = torch.randn(64)
    seen = chk(lambda x: x.cumsum(0).flip(0) + x.cumsum(0), x, rtol=2e-6, atol=1e-6)
    assert seen.K == 2
    between = chk(lambda x: (s := x.cumsum(0)) * s.sum(), x, rtol=2e-5, atol=1e-5)
    assert between.K >= 2


@pytest.mark.row("E3")
def test_readers_of_a_scan_in_tiles_are_in_its_kernel() -> None:
    text = """
graph f(x: f32[1, 50000]@cuda, y: f32[50000]@cuda) {
  s: f32[1, 50000]@cuda = scan (i0: 1, i1: 50000) along i1 (x[i0, i1]) by (left0 + right0) from (0.0:f32)
  z: f32[50000]@cuda = pointwise (i0: 50000) s[0, i0] * y[i0]
  return %z
}"""
    ctx = Context(Options.from_env({"cache_dir": None}), CostModel.analytical("cuda", 1))
    graph = fuse_scan_readers(fuse(parse_graph(text).check(), ctx), ctx)
    clear, scan = graph.nodes
    assert isinstance(scan, Kernel)
    assert [out.name for out in scan.outs] == ["s_tiles_told", "z"]
    assert scan.mutates == (clear.defs[0].name,)
    x, y = torch.rand(1, 50000), torch.rand(50000)
    (found,) = run_reference([graph], [[x, y]])[0]
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, x[0].cumsum(0) * y, rtol=1e-5, atol=1e-5)
