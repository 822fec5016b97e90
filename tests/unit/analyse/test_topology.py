"""Topology files, and the prices that come out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcompile.analyse.topology import read_topology
from dcompile.collectives.nodes import Kind
from dcompile.errors import DCompileError

TEXT = """
name = "two levels"
[compute]
flops_per_us = 1e4
bytes_per_us = 2e4
launch_us = 1.0
call_us = 3.5
matmul_flops_per_us = { f32 = 9e4 }
[[level]]
ranks = 1024
alpha_us = 30.0
bytes_per_us = 1000.0
contention = 0.2
hop_us = 5.0
steps = "tree"
[[level]]
ranks = 8
alpha_us = 10.0
bytes_per_us = 9000.0
contention = 0.7
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "topology.toml"
    path.write_text(text)
    return path


def test_a_group_is_priced_at_the_nearest_level_that_holds_it(tmp_path: Path) -> None:
    topology = read_topology(written(tmp_path, TEXT))
    groups = {"board": range(8, 16), "across": range(4, 12), "strided": range(0, 64, 8)}
    costs = topology.costs(groups)
    assert [costs.link(label).bytes_per_us for label in groups] == [9000, 1000, 1000]
    assert costs.roofline("cuda") == costs.roofline("cpu") == topology.compute


def test_trees_grow_with_the_logarithm(tmp_path: Path) -> None:
    level = read_topology(written(tmp_path, TEXT)).levels[1]
    times = [level.link_of(size).transfer_us(Kind.ALL_REDUCE, 0, size) for size in (2, 4, 1024)]
    assert times == pytest.approx([30, 30 + 2 * 5 * 1, 30 + 2 * 5 * 9])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name =", "nmae =", "unknown key nmae"),
        ("alpha_us = 30.0", "", "lacks alpha_us"),
        ("alpha_us = 30.0", 'alpha_us = "30"', "alpha_us = '30' is no number"),
        ("contention = 0.2", "contention = -1", "contention = -1"),
        ('steps = "tree"', 'steps = "star"', "ring or tree"),
        ("ranks = 8", "ranks = 0", "positive whole number"),
        ("hop_us = 5.0", "hops_us = 5.0", "unknown key hops_us"),
        ("{ f32 = 9e4 }", "{ f33 = 9e4 }", "f33"),
        ("[compute]", "[compute", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(DCompileError, match=message):
        read_topology(written(tmp_path, TEXT.replace(old, new)))


def test_ranks_beyond_the_last_level_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DCompileError, match="joins at most 1024 ranks, and group g0 has ranks 0 to 4095"):
        read_topology(written(tmp_path, TEXT)).costs({"g0": range(4096)})


@pytest.mark.parametrize("name", ["loopback_cpu", "gpu_boards"])
def test_the_files_of_the_benchmarks_can_be_read(name: str) -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "topologies" / f"{name}.toml"
    assert read_topology(path).costs({"g0": range(16)}).link("g0").bytes_per_us > 0
