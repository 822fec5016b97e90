"""Measured prices: what is kept, and where the measurement runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.pipeline import prices
from dcompile.pipeline.prices import PRICE, Prices, structure
from dcompile.runtime.cache import Cache

PRODUCT = """
graph f(NAME: f32[32, 16]@cuda, w: f32[16, COLUMNS]@cuda) {
  h: f32[32, COLUMNS]@cuda = extern aten.mm.default(%NAME, %w) -> aten.mm.out
  return %h
}"""


def product(name: str = "x", columns: int = 32) -> Graph:
    return parse_graph(PRODUCT.replace("NAME", name).replace("COLUMNS", str(columns))).check()


def test_names_do_not_count_and_layouts_do() -> None:
    assert structure(product()) == structure(product("y"))
    assert structure(product()) != structure(product(columns=64))


def test_a_price_is_measured_once_and_with_real_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "hardware", lambda device: f"card {device}")
    kinds: list[type] = []

    def measure(self: Prices, graph: Graph, entry: Path) -> None:
        kinds.append(type(torch.ones(2)))
        (entry / PRICE).write_text(json.dumps({"us": 12.5}))

    monkeypatch.setattr(Prices, "_measure", measure)
    found = Prices(Cache(tmp_path, 5.0), None, 0)  # type: ignore[arg-type]
    with FakeTensorMode():
        assert found(product()) == 12.5
        assert found(product("y")) == 12.5
    assert kinds == [torch.Tensor]
    assert found(product(columns=64)) == 12.5
    assert len(kinds) == 2
