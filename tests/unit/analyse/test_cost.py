"""Prices: composition of the roofline, and the measurements the default numbers were taken from."""

from __future__ import annotations

import pytest

from dcompile.analyse.cost import DEFAULT_LINK, CostModel, Roofline
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug
from dcompile.ir.types import DType

ROOF = Roofline(flops_per_us=10, bytes_per_us=100, launch_us=1, call_us=5, matmul_flops_per_us={DType.F32: 50})
MODEL = CostModel({"cpu": ROOF}, {"g0": LinkModel(7, 10, 0.5), DEFAULT_LINK: LinkModel(70, 10, 0.25)})

PROGRAM = parse_graph(
    """graph g(x: f32[100], w: f32[10, 10]) {
      light: f32[100] = pointwise (i0: 100) x[i0] + 1.0:f32
      heavy: f32[100] = pointwise (i0: 100) exp(x[i0])
      v: f32[10, 10] = view x (i0: 10, i1: 10) -> [10*i0 + i1]
      m: f32[10, 10] = extern aten.mm.default(%w, %w)
      e: f32[10, 10] = extern aten.relu.default(%w)
      p: pending (r: f32[100]) = start all_reduce.sum (heavy) @g0[2]
      q: pending (s: f32[100]) = start all_reduce.sum (light) @g1[2]
      r: f32[100] = wait p
      s: f32[100] = wait q
      return %r, %s, %v, %m, %e
    }"""
)


def node_us(name: str) -> float:
    return MODEL.node_us(PROGRAM.nodes[PROGRAM.producer[name]], PROGRAM)


def start(name: str) -> Start:
    node = PROGRAM.nodes[PROGRAM.producer[name]]
    assert isinstance(node, Start)
    return node


def test_a_node_costs_its_fixed_time_and_the_longer_of_arithmetic_and_memory() -> None:
    assert node_us("light") == pytest.approx(1 + max(100 / 10, 800 / 100))
    assert node_us("heavy") == pytest.approx(1 + max(12 * 100 / 10, 800 / 100))
    assert node_us("m") == pytest.approx(5 + max(2000 / 50, 800 / 100))
    assert node_us("e") == pytest.approx(5 + 800 / 100)


def test_views_and_waits_are_free_and_a_launch_is_not() -> None:
    assert node_us("v") == node_us("r") == 0
    assert node_us("p") == 1


def test_each_group_has_its_link() -> None:
    assert MODEL.transfer_us(start("p"), PROGRAM) == pytest.approx(7 + 40)
    assert MODEL.transfer_us(start("q"), PROGRAM) == pytest.approx(70 + 40)
    assert (MODEL.contention(start("p")), MODEL.contention(start("q"))) == (0.5, 0.25)


def test_unknown_devices_and_groups_are_bugs() -> None:
    with pytest.raises(CompilerBug, match="tpu"):
        CostModel.analytical("tpu", 2)
    with pytest.raises(CompilerBug, match="cuda"):
        MODEL.roofline("cuda")
    with pytest.raises(CompilerBug, match="g7"):
        CostModel({"cpu": ROOF}, {"g0": LinkModel(7, 10, 0.5)}).link("g7")


def all_reduce(nbytes: int, device: str, kind: str = "all_reduce.sum", rows: int = 1) -> float:
    n = nbytes // 4
    text = (
        f"graph g(x: f32[{n}]@{device}) {{\n p: pending (r: f32[{n * rows}]@{device}) = start {kind} (x) @g0[2]\n"
        f" r: f32[{n * rows}]@{device} = wait p\n return %r\n}}\n"
    )
    graph = parse_graph(text)
    node = graph.nodes[0]
    assert isinstance(node, Start)
    return CostModel.analytical(device, 2).transfer_us(node, graph)


@pytest.mark.parametrize(
    ("nbytes", "measured_us"),
    [(4 << 10, 38), (1 << 20, 35), (16 << 20, 75), (64 << 20, 252), (256 << 20, 892), (1 << 30, 3236)],
)
def test_nccl_all_reduce_is_within_a_third_of_the_measurement(nbytes: int, measured_us: float) -> None:
    assert all_reduce(nbytes, "cuda") == pytest.approx(measured_us, rel=1 / 3)


@pytest.mark.parametrize(("nbytes", "measured_us"), [(64 << 20, 293), (256 << 20, 1054), (1 << 30, 3714)])
def test_nccl_all_gather_is_within_a_third_of_the_measurement(nbytes: int, measured_us: float) -> None:
    assert all_reduce(nbytes, "cuda", "all_gather", rows=2) == pytest.approx(measured_us, rel=1 / 3)


@pytest.mark.parametrize(
    ("nbytes", "best_us", "median_us"),
    [(4 << 10, 325, 500), (1 << 20, 522, 2412), (16 << 20, 8725, 13581), (64 << 20, 41576, 50112)],
)
def test_gloo_all_reduce_lies_between_best_and_median_of_the_measurement(
    nbytes: int, best_us: float, median_us: float
) -> None:
    assert 0.8 * best_us <= all_reduce(nbytes, "cpu") <= 1.2 * median_us


def test_larger_worlds_cross_the_network() -> None:
    board, cluster = CostModel.analytical("cuda", 8), CostModel.analytical("cuda", 16)
    assert board.link("g0").bytes_per_us > 5 * cluster.link("g0").bytes_per_us


def test_a_large_matmul_on_the_gpu_takes_its_measured_time() -> None:
    text = (
        "graph g(a: bf16[8192, 8192]@cuda, b: bf16[8192, 8192]@cuda) {\n"
        " c: bf16[8192, 8192]@cuda = extern aten.mm.default(%a, %b)\n return %c\n}\n"
    )
    graph = parse_graph(text)
    assert CostModel.analytical("cuda", 1).node_us(graph.nodes[0], graph) == pytest.approx(5950 / 4, rel=0.05)
