from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dcompile.collectives.text import parse_graph, print_graph
from dcompile.reference import run_reference
from tests.strategies import assert_same, copy_inputs, random_inputs

PAGE = Path(__file__).parents[3] / "docs" / "ir.md"
EXAMPLES = re.findall(r"```text\n(graph .*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("position", range(2), ids=["loops", "ordered"])
def test_the_examples_are_what_is_printed(position: int) -> None:
    assert print_graph(parse_graph(EXAMPLES[position])) == EXAMPLES[position]


def test_the_example_computes_the_same_before_and_after() -> None:
    before, after = (parse_graph(text) for text in EXAMPLES)
    inputs = random_inputs(before, 8)
    expected = run_reference([before] * 8, copy_inputs(inputs))
    assert_same(run_reference([after] * 8, inputs), expected)
    assert all(isinstance(x, torch.Tensor) and float(x.abs().min()) > 0 for x in expected[0])
