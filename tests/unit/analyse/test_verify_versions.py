"""Rule V6 where one storage has several names: overlapping views, bases of written views, returned operands."""

from __future__ import annotations

from dcompile.analyse.verify import verify
from dcompile.collectives.text import parse_graph
from tests.unit.analyse.plans import broken, kernel, make, program

OVERLAP = (
    "v: f32[8] = view x (i0: 8) -> [i0]",
    "w: f32[8] = view x (i0: 8) -> [i0 + 4]",
    "extern aten.mul_.Tensor(%v, 0.5) writes (v) versions (v2: f32[8])  # aten.mul_ @net.py:3",
)
READ_OTHER = "b: f32[8] = extern aten.relu.default(%w)  # aten.relu @net.py:4"


def test_v6_overwritten_through_another_view() -> None:
    before = program(*OVERLAP[:2], READ_OTHER, OVERLAP[2], returns="%b, %v2")
    after = program(*OVERLAP, READ_OTHER, returns="%b, %v2")
    verify(make(before))
    broken(make(after), "V6", "step 3", "reads w", "[16, 32) of x", "hold v2", "not x", "net.py:4")
    for text, other in ((before, after), (after, before)):
        verify(make(text), parse_graph(text))
        broken(make(text), "V6", "reads w", "[16, 32) of x", program=parse_graph(other))
    apart = [step.replace("i0 + 4", "i0 + 8") for step in OVERLAP]
    orders = [program(*steps, returns="%b") for steps in ((*apart, READ_OTHER), (*apart[:2], READ_OTHER, apart[2]))]
    for text in orders:
        verify(make(text))
        verify(make(text), parse_graph(orders[0]))


def test_v6_a_base_is_read_after_a_write_through_a_view() -> None:
    read = kernel("b", "x")
    before = program(*OVERLAP[:2], read, OVERLAP[2], returns="%b, %v2")
    after = program(*OVERLAP, read, returns="%b, %v2")
    verify(make(before))
    broken(make(after), "V6", "reads x", "[0, 32)", "hold v2")
    verify(make(after), parse_graph(after))
    broken(make(after), "V6", "reads x", "[0, 32)", "hold v2", program=parse_graph(before))
    broken(make(before), "V6", "reads x", "[0, 32)", "hold x, not v2", program=parse_graph(after))


def test_v6_two_writes_to_common_bytes_change_places() -> None:
    second = "extern aten.relu_.default(%w) writes (w) versions (w2: f32[8])"
    one, other = (
        program(*OVERLAP[:2], *writes, returns="%y") for writes in ((OVERLAP[2], second), (second, OVERLAP[2]))
    )
    verify(make(one), parse_graph(one))
    broken(make(one), "V6", "step 2", "reads v", "hold x, not w2", program=parse_graph(other))


def test_v6_a_returned_view_is_overwritten() -> None:
    one = program(*OVERLAP, returns="%w, %v2")
    broken(make(one), "V6", "the end", "reads w", "hold v2")
    verify(make(one), parse_graph(one))


def test_a_result_that_is_the_operand_which_the_call_writes_shows_the_new_version() -> None:
    text = program(
        "a: f32[16] = extern lib.scale_.default(%x) writes (x) versions (x2: f32[16]) aliases (x)",
        kernel("b", "a"), returns="%b, %x2",
    )  # fmt: skip
    verify(make(text))
    verify(make(text), parse_graph(text))
