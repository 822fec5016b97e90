"""A cluster on paper: what its processors and its links cost, from a TOML file.

name = "eight GPUs a board, one network port each"

[compute]                 # one rank's processor, see ``cost.Roofline``
flops_per_us = 3.0e7
bytes_per_us = 3.8e6
launch_us = 4.0
call_us = 6.0
matmul_flops_per_us = { bf16 = 7.4e8, f32 = 5.0e7 }

[[level]]                 # links, the nearest ranks first
ranks = 8                 # consecutive ranks that are joined at this level
alpha_us = 33.0           # the rest as in ``collectives.cost.LinkModel``
bytes_per_us = 332000.0
contention = 0.75
hop_us = 1.0

[[level]]
ranks = 100000
alpha_us = 30.0
bytes_per_us = 28500.0
contention = 0.15
hop_us = 5.0
steps = "tree"            # latency of all-reduces grows with the logarithm of the ranks; "ring" (default): linearly
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcompile.analyse.cost import DEFAULT_LINK, CostModel, Roofline
from dcompile.collectives.cost import LinkModel, ring_steps
from dcompile.collectives.nodes import Kind
from dcompile.errors import DCompileError
from dcompile.ir.types import DType

STEPS = ("ring", "tree")


@dataclass(frozen=True)
class Level:
    """Links between ranks of one block.

    Attributes:
        ranks: consecutive ranks of a block; blocks begin at multiples of it.
        link: what a collective within a block costs.
        steps: how latency grows with the ranks: ``"ring"`` or ``"tree"``.
    """

    ranks: int
    link: LinkModel
    steps: str = "ring"

    def holds(self, ranks: Sequence[int]) -> bool:
        """Whether all ``ranks`` are in one block."""
        return len({rank // self.ranks for rank in ranks}) <= 1

    def link_of(self, size: int) -> LinkModel:
        """The link as a group of ``size`` ranks meets it."""
        added = ring_steps(Kind.ALL_REDUCE, size) - ring_steps(Kind.ALL_REDUCE, 2)
        if self.steps == "ring" or added <= 0:
            return self.link
        return replace(self.link, hop_us=self.link.hop_us * 2 * (math.log2(size) - 1) / added)


@dataclass(frozen=True)
class Topology:
    """See the module's text. ``levels`` are in ascending order of ``ranks``."""

    name: str
    compute: Roofline
    levels: tuple[Level, ...]

    def costs(self, groups: Mapping[str, Sequence[int]]) -> CostModel:
        """Prices of a program whose groups, by label, have these global ranks. Every device is priced as ``compute``.

        Raises:
            DCompileError: ranks that no level joins.
        """
        links: dict[str, LinkModel] = {DEFAULT_LINK: self.levels[-1].link}
        for label, ranks in groups.items():
            level = next((level for level in self.levels if level.holds(ranks)), None)
            if level is None:
                raise DCompileError(
                    f"topology {self.name!r} joins at most {self.levels[-1].ranks} ranks, and group {label} has ranks "
                    f"{min(ranks)} to {max(ranks)}: add a [[level]] with more"
                )
            links[label] = level.link_of(len(ranks))
        return CostModel({"cpu": self.compute, "cuda": self.compute}, links)


def read_topology(path: Path) -> Topology:
    """The topology in the file ``path``.

    Raises:
        DCompileError: the file cannot be read, or a key is missing, unknown or of the wrong kind; names it.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DCompileError(f"topology {path} cannot be read: {error}") from error
    if unknown := found.keys() - {"name", "compute", "level"}:
        raise DCompileError(f"topology {path}: unknown key {', '.join(sorted(unknown))}")
    levels = [_level(path, number, table) for number, table in enumerate(found.get("level", ()), 1)]
    if not levels:
        raise DCompileError(f"topology {path}: there is no [[level]]")
    compute = dict(found.get("compute", {}))
    try:
        matmul = {DType(name): float(value) for name, value in compute.pop("matmul_flops_per_us", {}).items()}
    except ValueError as error:
        raise DCompileError(f"topology {path}: [compute] matmul_flops_per_us: {error}") from error
    known = ("flops_per_us", "bytes_per_us", "launch_us", "call_us")
    flops, nbytes, launch, call, cores = _numbers(path, "[compute]", compute, known, ("multiprocessors",))
    roofline = Roofline(flops, nbytes, launch, call, matmul, int(cores))
    return Topology(str(found.get("name", path.stem)), roofline, tuple(sorted(levels, key=lambda level: level.ranks)))


def _level(path: Path, number: int, table: Mapping[str, Any]) -> Level:
    where = f"[[level]] {number}"
    values = dict(table)
    ranks, steps = values.pop("ranks", None), values.pop("steps", "ring")
    if not isinstance(ranks, int) or ranks < 1 or steps not in STEPS:
        raise DCompileError(f"topology {path}: {where} needs ranks, a positive whole number, and steps ring or tree")
    try:
        slowdown = {Kind(name): float(value) for name, value in values.pop("slowdown", {}).items()}
    except ValueError as error:
        raise DCompileError(f"topology {path}: {where} slowdown: {error}") from error
    known = ("alpha_us", "bytes_per_us", "contention")
    alpha, nbytes, contention, hop = _numbers(path, where, values, known, ("hop_us",))
    link = LinkModel(alpha, nbytes, contention, hop, slowdown)
    return Level(ranks, link, steps)


def _numbers(
    path: Path, where: str, table: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str]
) -> list[float]:
    """The numbers of ``table`` in the order of ``needed`` and ``optional``, which are 0 where they are not given."""
    if unknown := table.keys() - {*needed, *optional}:
        raise DCompileError(f"topology {path}: {where} has an unknown key {', '.join(sorted(unknown))}")
    if missing := set(needed) - table.keys():
        raise DCompileError(f"topology {path}: {where} lacks {', '.join(sorted(missing))}")
    for name, value in table.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise DCompileError(f"topology {path}: {where} {name} = {value!r} is no number of at least 0")
    return [float(table.get(name, 0)) for name in (*needed, *optional)]
