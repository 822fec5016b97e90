"""Rules V13 and V14: a plan that passes, and the same plan against another program."""

from __future__ import annotations

from dcompile.analyse.verify import verify
from dcompile.collectives.text import parse_graph
from tests.unit.analyse.plans import broken, kernel, make, program

EFFECTS = (
    "a: f32[16] = extern lib.print.default(%x) effect",
    "b: f32[16] = extern lib.print.default(%y) effect",
)
QUIET = "c: f32[16] = extern aten.relu.default(%y)"
SILENT = ("extern lib.flush.default(1) effect", "extern lib.flush.default(2) effect")


def test_v13_effects_keep_program_order() -> None:
    before = program(*EFFECTS, QUIET, returns="%c")
    verify(make(program(EFFECTS[0], QUIET, EFFECTS[1], returns="%c")), parse_graph(before))
    verify(make(program(*reversed(EFFECTS), QUIET, returns="%c")))
    broken(make(program(*reversed(EFFECTS), QUIET, returns="%c")), "V13", "step 0", "b", program=parse_graph(before))
    verify(make(program(*SILENT, SILENT[0], returns="%x")), parse_graph(program(*SILENT, SILENT[0], returns="%x")))
    swapped = make(program(*reversed(SILENT), returns="%x"))
    broken(swapped, "V13", "step 0", program=parse_graph(program(*SILENT, returns="%x")))


def test_v13_nothing_passes_a_barrier() -> None:
    barrier = EFFECTS[0].replace("effect", "barrier")
    before = program(QUIET, kernel("d", "x"), barrier, returns="%c, %d")
    verify(make(program(kernel("d", "x"), QUIET, barrier, returns="%c, %d")), parse_graph(before))
    late = make(program(kernel("d", "x"), barrier, QUIET, returns="%c, %d"))
    verify(late)
    broken(late, "V13", "step 2", "after 1 barriers, in the program after 0", program=parse_graph(before))


def test_v14_the_steps_are_the_programs() -> None:
    steps = (kernel("a", "x"), kernel("b", "y"), SILENT[0])
    whole = program(*steps, returns="%a")
    verify(make(whole), parse_graph(whole))
    broken(make(program(steps[0], steps[2], returns="%a")), "V14", "Kernel b is missing", program=parse_graph(whole))
    broken(make(program(*steps[:2], returns="%a")), "V14", "is missing", program=parse_graph(whole))
    broken(make(whole), "V14", "no such step", "b", program=parse_graph(program(steps[0], steps[2], returns="%a")))
    twice = make(program(*steps, SILENT[0], returns="%a"))
    broken(twice, "V14", "step 3", "once less", program=parse_graph(whole))
    other = make(program(steps[0], kernel("b", "x"), steps[2], returns="%a"))
    broken(other, "V14", "step 1", "other operands", program=parse_graph(whole))
    broken(make(program(*steps, returns="%b")), "V14", "takes or returns", program=parse_graph(whole))
