"""The cells of the matrix: how a model is spread over ranks, in which type, with which shapes, order and cache.

{ranks 1, 2, 4} x {gloo, nccl} x {ddp, torch-ddp, fsdp, hsdp, tp, tp+fsdp} x {f32, bf16} x {static, dynamic}
x {overlap on, off} x {cold, warm cache}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

RANKS = (1, 2, 4)
WAYS = ("ddp", "torch-ddp", "fsdp", "hsdp", "tp", "tp+fsdp")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ("static", "dynamic")
OVERLAPS = ("overlap", "in-order")
CACHES = ("cold", "warm")


@dataclass(frozen=True, order=True)
class Cell:
    """One case; every field is a word of its name."""

    ranks: int
    backend: str
    way: str
    dtype: str
    shapes: str
    overlap: str
    cache: str

    @property
    def name(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))


def backends() -> tuple[str, ...]:
    """gloo, and nccl where there is a GPU."""
    return ("gloo", "nccl") if torch.cuda.is_available() else ("gloo",)


def possible(ranks: int, backend: str, way: str) -> bool:
    """Whether a way makes sense on so many ranks, and the machine has the devices."""
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        return False
    return ranks >= {"hsdp": 4, "tp+fsdp": 4, "tp": 2}.get(way, 1)


def all_cells() -> Iterator[Cell]:
    """Every cell this machine can run."""
    for ranks, backend, way in itertools.product(RANKS, backends(), WAYS):
        if possible(ranks, backend, way):
            for rest in itertools.product(DTYPES, SHAPES, OVERLAPS, CACHES):
                yield Cell(ranks, backend, way, *rest)


def spread_cells() -> list[Cell]:
    """A few cells in which every pair (ranks, way) is met, and each value of the other axes with several of them.

    Deterministic: the other axes go round, each with a period of its own.
    """
    chosen = []
    pairs = [p for p in itertools.product(RANKS, backends(), WAYS) if possible(*p)]
    for n, (ranks, backend, way) in enumerate(pairs):
        rest = (list(DTYPES)[n % 2], SHAPES[n // 2 % 2], OVERLAPS[n // 3 % 2], CACHES[n // 4 % 2])
        chosen.append(Cell(ranks, backend, way, *rest))
    return chosen
