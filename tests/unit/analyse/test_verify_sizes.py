"""Symbolic sizes: what holds at the hints only is found at other sizes."""

from __future__ import annotations

from dataclasses import replace

from dcompile.analyse.verify import other_sizes, verify
from dcompile.collectives.text import parse_graph
from tests.unit.analyse.plans import broken, kernel, make, program


def test_memory_that_fits_at_the_hint_only() -> None:
    text = program(kernel("a", "x").replace("16", "s0"), returns="%a", inputs="x: f32[s0], s0: size = 16")
    plan = make(text)
    verify(plan)
    fixed = replace(plan, storages={**plan.storages, "a": replace(plan.storages["a"], nbytes=64)})
    broken(fixed, "V11", "a takes 128 bytes", "s0 = 32")


def test_bytes_that_are_apart_at_the_hint_and_twice_it_only() -> None:
    """Two views whose distance is constant: they overlap when the first one grows."""
    sizes = "x: f32[3*s0 + 64], s0: size = 16"
    steps = (
        "v: f32[s0] = view x (i0: s0) -> [i0]",
        "w: f32[16] = view x (i0: 16) -> [i0 + 32]",
        "extern aten.mul_.Tensor(%v, 0.5) writes (v) versions (v2: f32[s0])",
        "b: f32[16] = extern aten.relu.default(%w)",
    )
    text = program(*steps, returns="%b", inputs=sizes)
    broken(make(text), "V6", "reads w", "hold v2", "s0 = 48")
    verify(make(text), parse_graph(text))
    early = program(*steps[:2], steps[3], steps[2], returns="%b", inputs=sizes)
    broken(make(text), "V6", "reads w", "s0 = 48", program=parse_graph(early))


def test_sizes_that_the_program_does_not_admit_are_not_tried() -> None:
    def tried(steps: str, inputs: str, returns: str = "%x") -> list[list[int]]:
        graph = parse_graph(program(steps, returns=returns, inputs=inputs))
        return [list(sizes.values()) for sizes in other_sizes(graph)]

    assert tried(kernel("a", "x"), "x: f32[16]") == []
    assert tried(kernel("a", "x"), "x: f32[16], s0: size = 4, s1: size = 3") == [[8, 6], [12, 12]]
    view = "v: f32[s0] = view x (i0: s0) -> [i0]"
    assert tried(view, "x: f32[16], s0: size = 8") == [[16]]
    rest = "v: f32[20 - s0] = view x (i0: 20 - s0) -> [i0 + s0]"
    assert tried(rest, "x: f32[20], s0: size = 7") == [[14]]
    pack = "f: f32[24] = pack (x, y)"
    assert tried(pack, "x: f32[s0], y: f32[16], s0: size = 8") == []
