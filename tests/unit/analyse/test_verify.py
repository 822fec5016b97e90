"""Each rule of the verifier: a plan that passes, and the same plan with one thing wrong that this rule names."""

from __future__ import annotations

import inspect
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dcompile.analyse import verify as verifier
from dcompile.analyse.verify import verify
from dcompile.collectives.text import parse_graph
from dcompile.plan import Home, Slot, Storage
from tests.unit.analyse.plans import broken, kernel, make, program, store

IN_PLACE = "p: pending in place (r: f32[16]) = start all_reduce.sum (a) @g0[2]"
GATHER = "p: pending (r: f32[32]) = start all_gather (a) @g0[2]"
WAIT, WAIT_GATHER = "r: f32[16] = wait p", "r: f32[32] = wait p"


# Plans that are safe


def test_arena_bytes_are_used_again_after_the_last_reader() -> None:
    text = program(kernel("a", "x"), kernel("b", "a"), kernel("c", "b"), kernel("out", "c"), returns="%out")
    verify(make(text, arena={"a": 0, "b": 64, "c": 0}))


def test_in_flight_sources_may_be_read_and_other_memory_used() -> None:
    text = program(
        kernel("a", "x"),
        GATHER,
        kernel("b", "a"),
        kernel("c", "b"),
        WAIT_GATHER,
        kernel("out", "c"),
        returns="%out, %r",
    )
    verify(make(text, arena={"a": 0, "b": 64, "c": 128}))


def test_an_in_place_collective_on_a_slice_of_a_returned_buffer() -> None:
    text = program(
        kernel("a", "x", 32),
        "s: f32[16] = view a (i0: 16) -> [i0 + 16]",
        "p: pending in place (r: f32[16]) = start all_reduce.sum (s) @g0[2]",
        "t: f32[16] = view a (i0: 16) -> [i0]",
        kernel("b", "x", 16),
        WAIT,
        kernel("c", "a", 32),
        returns="%c, %r, %t, %b",
        inputs="x: f32[32]",
    )
    verify(make(text), parse_graph(text))
    broken(make(text), "V6", "reads a", "[64, 128)", "hold r", "not a")  # only the program says that r is wanted there


def test_a_kernel_may_work_in_place_where_it_says_so() -> None:
    text = program(kernel("a", "x"), kernel("b", "a", inplace="a"), kernel("out", "b"), returns="%out")
    verify(make(text, arena={"a": 0, "b": 0}))
    verify(make(text, arena={"a": 0}, slots={"b": Slot("a")}))


def test_parts_placed_in_a_pack() -> None:
    text = program(
        kernel("a", "x"), kernel("b", "y"), "f: f32[32] = pack (a, b)",
        "p: pending in place (r: f32[32]) = start all_reduce.sum (f) @g0[2]", "r: f32[32] = wait p", returns="%r",
    )  # fmt: skip
    verify(make(text, slots={"a": Slot("f", 0), "b": Slot("f", 64)}))
    verify(make(text, arena={"a": 0}, slots={"b": Slot("f", 64)}))


def test_declared_mutations_of_inputs_and_symbolic_sizes() -> None:
    verify(make(program(store("x2", "x", "y"), kernel("out", "x2"), returns="%out, %x2")))
    text = program(kernel("a", "x").replace("16", "s0"), returns="%a", inputs="x: f32[s0], s0: size = 16")
    verify(make(text))


def test_library_results_and_their_aliases_are_freed_after_use() -> None:
    text = program(
        "a: f32[16] = extern aten.sort_values.default(%x)", "v: f32[16] = extern aten.alias.default(%a) aliases (a)",
        kernel("out", "v"), returns="%out",
    )  # fmt: skip
    verify(make(text, frees={2: ("a",)}))


def test_empty_tensors() -> None:
    text = program(
        kernel("a", "x", 0),
        "v: f32[0] = view a (i0: 0) -> [i0 + 3]",
        kernel("b", "v", 0).replace("v[", "a["),
        returns="%b, %v",
        inputs="x: f32[0]",
    )
    verify(make(text))


# V1 to V12, each broken once


def test_v1_reading_what_nothing_wrote() -> None:
    plan = make(program(kernel("a", "x"), kernel("b", "a", at="net.py:5"), returns="%b"))
    verify(plan)
    first, second = plan.graph.nodes
    broken(
        replace(plan, graph=plan.graph.with_nodes((second, first))), "V1", "step 0", "reads a", "[0, 64)", "net.py:5"
    )


def test_v1_parts_are_written_but_not_the_pack() -> None:
    text = program(
        kernel("a", "x"), kernel("b", "y"), "f: f32[32] = pack (a, b)", kernel("out", "f", 32), returns="%out"
    )
    plan = make(text, slots={"a": Slot("f", 0), "b": Slot("f", 64)})
    verify(plan)
    *parts, pack, reader = plan.graph.nodes
    broken(replace(plan, graph=plan.graph.with_nodes((*parts, reader, pack))), "V1", "step 2", "reads f")


@pytest.mark.row("T3")
def test_v2_a_source_in_flight_is_written() -> None:
    safe = program(kernel("a", "x"), GATHER, WAIT_GATHER, store("a2", "a", "y"), returns="%r, %a2")
    racy = program(kernel("a", "x"), GATHER, store("a2", "a", "y"), WAIT_GATHER, returns="%r, %a2")
    verify(make(safe))
    broken(make(racy), "V2", "step 2", "a2", "[0, 64)", "p, which is in flight")


def test_v2_arena_bytes_of_a_source_are_reused_in_flight() -> None:
    text = program(kernel("a", "x"), GATHER, kernel("b", "y"), kernel("out", "b"), WAIT_GATHER, returns="%r, %out")
    verify(make(text, arena={"a": 0, "b": 64}))
    broken(make(text, arena={"a": 64, "b": 64}), "V2", "step 2", "b")
    overlapping = make(text, arena={"a": 64, "b": 64})
    one_byte_in = {**overlapping.storages, "b": Storage("b", Home.ARENA, 72, "cpu", 0)}
    broken(replace(overlapping, storages=one_byte_in, slots={**overlapping.slots, "b": Slot("b", 8)}), "V2", "[64, 72)")


def test_v3_results_are_touched_before_the_wait() -> None:
    text = program(
        kernel("a", "x"),
        GATHER,
        kernel("b", "y"),
        kernel("out", "b"),
        WAIT_GATHER,
        kernel("o2", "r", 32),
        returns="%o2, %out",
    )
    verify(make(text, arena={"a": 0, "b": 64, "r": 128}))
    broken(make(text, arena={"a": 0, "b": 192, "r": 128}), "V3", "step 2", "writes b", "result of p")


@pytest.mark.row("T2")
def test_v4_an_in_place_buffer_is_touched_in_flight() -> None:
    safe = program(kernel("a", "x"), kernel("b", "a"), IN_PLACE, WAIT, returns="%r, %b")
    racy = program(kernel("a", "x"), IN_PLACE, kernel("b", "a", at="train.py:41"), WAIT, returns="%r, %b")
    verify(make(safe))
    broken(make(racy), "V4", "reads a", "train.py:41")


def test_v4_through_a_slice() -> None:
    def text(start: int) -> str:
        return program(
            kernel("a", "x", 32), "s: f32[16] = view a (i0: 16) -> [i0 + 16]",
            f"t: f32[16] = view a (i0: 16) -> [i0 + {start}]",
            "p: pending in place (r: f32[16]) = start all_reduce.sum (s) @g0[2]",
            "c: f32[16] = extern aten.relu.default(%t)", WAIT, returns="%r, %c", inputs="x: f32[32]",
        )  # fmt: skip

    verify(make(text(0)))
    broken(make(text(1)), "V4", "reads t", "[64, 68)")


def test_v5_memory_in_flight_is_freed() -> None:
    text = program(kernel("a", "x"), GATHER, WAIT_GATHER, returns="%r")
    verify(make(text, frees={2: ("a",)}))
    broken(make(text, frees={1: ("a",)}), "V5", "step 1", "frees a")


def test_v6_bytes_still_to_be_read_are_overwritten() -> None:
    text = program(kernel("a", "x"), kernel("b", "y"), kernel("c", "a"), kernel("out", "b"), returns="%out, %c")
    verify(make(text, arena={"a": 0, "b": 64}))
    broken(make(text, arena={"a": 0, "b": 0}), "V6", "step 2", "reads a", "hold b")


def test_v6_an_old_version_is_read() -> None:
    verify(make(program(kernel("b", "x"), store("x2", "x", "y"), returns="%b, %x2")))
    broken(make(program(store("x2", "x", "y"), kernel("b", "x"), returns="%b, %x2")), "V6", "reads x", "version x2")
    view = "v: f32[4] = view x (i0: 4) -> [i0]"
    stale = program(view, store("x2", "x", "y"), "b: f32[4] = extern aten.relu.default(%v)", returns="%b, %x2")
    broken(make(stale), "V6", "reads v", "x was overwritten")


def test_v7_a_collective_is_never_waited_for() -> None:
    verify(make(program(kernel("a", "x"), IN_PLACE, WAIT, returns="%x")))
    text = program(kernel("a", "x"), GATHER, returns="%x")
    plan = make(text.replace("(r:", "(r:"))
    whole = replace(
        plan,
        slots={**plan.slots, "r": Slot("r")},
        storages={**plan.storages, "r": Storage("r", Home.FRESH, 128, "cpu")},
    )
    broken(whole, "V7", "p launched but never waited for")


def test_v7_a_wait_without_or_before_its_launch() -> None:
    plan = make(program(kernel("a", "x"), GATHER, WAIT_GATHER, returns="%r"))
    nodes = plan.graph.nodes
    broken(replace(plan, graph=plan.graph.with_nodes((nodes[0], nodes[2], nodes[1]))), "V7", "waits on p")


def test_v7_a_second_wait() -> None:
    plan = make(program(kernel("a", "x"), GATHER, WAIT_GATHER, returns="%r"))
    again = parse_graph(program(kernel("a", "x"), GATHER, WAIT_GATHER.replace("r:", "again:"), returns="%x")).nodes[2]
    twice = replace(
        plan,
        graph=plan.graph.with_nodes((*plan.graph.nodes, again)),
        slots={**plan.slots, "again": Slot("again")},
        storages={**plan.storages, "again": Storage("again", Home.FRESH, 128, "cpu")},
    )
    broken(twice, "V7", "step 3", "p")


def test_v8_use_after_free_and_double_free() -> None:
    text = program(kernel("a", "x"), kernel("b", "a"), kernel("c", "y"), returns="%b, %c")
    verify(make(text, frees={1: ("a",)}))
    broken(make(text, frees={0: ("a",)}), "V8", "step 1", "a is used after")
    broken(make(text, frees={1: ("a",), 2: ("a",)}), "V8", "a second time")
    broken(make(text, frees={2: ("b",)}), "V8", "the end", "b is used after")
    broken(make(text, arena={"a": 0}, frees={1: ("a",)}), "V8", "no storage of its own")
    broken(make(text, frees={1: ("nothing",)}), "V8", "nothing")


def test_v9_launches_in_another_order_than_the_program() -> None:
    first = "p: pending (r: f32[32]) = start all_gather (x) @g0[2]"
    second = "q: pending (s: f32[32]) = start all_gather (y) @g0[2]"
    waits = ("r: f32[32] = wait p", "s: f32[32] = wait q")
    before = parse_graph(program(first, second, *waits, returns="%r, %s"))
    verify(make(program(first, second, *waits, returns="%r, %s")), before)
    broken(make(program(second, first, *waits, returns="%r, %s")), "V9", "g0", "q, p", program=before)
    other = second.replace("@g0", "@g1")
    verify(
        make(program(other, first, *waits, returns="%r, %s")),
        parse_graph(program(first, other, *waits, returns="%r, %s")),
    )


def test_v10_an_inputs_memory_is_taken_or_freed_and_outputs_stay_out_of_the_arena() -> None:
    text = program(kernel("a", "x"), kernel("out", "a"), returns="%out")
    verify(make(text, arena={"a": 0}))
    broken(make(text, slots={"a": Slot("y")}), "V10", "step 0", "input storage y")
    broken(make(text, frees={1: ("y",)}), "V10", "frees input storage y")
    broken(make(text, arena={"a": 0, "out": 64}), "V10", "out lies in the arena")


def test_v11_nodes_and_places_that_cannot_be() -> None:
    text = program(kernel("a", "x"), "v: f32[8] = view a (i0: 8) -> [i0 + 4]", kernel("out", "a"), returns="%out, %v")
    plan = make(text)
    verify(plan)
    storage, slots = plan.storages["a"], dict(plan.slots)
    del slots["out"]
    pointwise = parse_graph(program("b: f32[16] = pointwise (i0: 16) x[i0] + 1.0:f32", returns="%b"))
    loops = replace(make(text), graph=pointwise)
    arena = {"a": replace(storage, home=Home.ARENA, arena_offset=32)}
    broken(loops, "V11", "Pointwise")
    broken(replace(plan, slots=slots), "V11", "out has no place")
    broken(replace(plan, slots={**plan.slots, "out": Slot("lost")}), "V11", "lost")
    broken(replace(plan, slots={**plan.slots, "out": Slot("out", 4)}), "V11", "64 bytes at 4")
    broken(replace(plan, slots={**plan.slots, "v": Slot("a", 20)}), "V11", "byte 16")
    broken(replace(plan, storages={**plan.storages, **arena}, arena_bytes={"cpu": 128}), "V11", "starts at 32")
    broken(
        replace(plan, storages={**plan.storages, "a": replace(storage, home=Home.ARENA, arena_offset=64)}),
        "V11",
        "ends at 128",
    )
    broken(
        replace(plan, storages={**plan.storages, "a": replace(storage, arena_offset=64)}), "V11", "has an arena offset"
    )
    broken(replace(plan, storages={**plan.storages, "a": replace(storage, device="cuda")}), "V11", "is on cpu")
    broken(
        replace(plan, storages={**plan.storages, "x": replace(plan.storages["x"], home=Home.FRESH)}), "V11", "input x"
    )
    versions = make(program(store("x2", "x", "y"), returns="%x2"))
    apart = {**versions.storages, "x2": Storage("x2", Home.FRESH, 64, "cpu")}
    broken(replace(versions, storages=apart, slots={**versions.slots, "x2": Slot("x2")}), "V11", "next version of x")


def test_v12_a_result_over_an_operand() -> None:
    allowed = program(kernel("a", "x"), kernel("b", "a", inplace="a"), kernel("out", "b"), returns="%out")
    silent = program(kernel("a", "x"), kernel("b", "a"), kernel("out", "b"), returns="%out")
    verify(make(allowed, arena={"a": 0, "b": 0}))
    broken(make(silent, arena={"a": 0, "b": 0}), "V12", "step 1", "b is written over a")
    library = silent.replace(kernel("b", "a"), "b: f32[16] = extern aten.relu.default(%a) -> aten.relu.out\n")
    broken(make(library, arena={"a": 0, "b": 0}), "V12", "b is written over a")


def test_v12_a_part_is_placed_at_the_wrong_position_of_its_pack() -> None:
    text = program(
        kernel("a", "x"), kernel("b", "y"), "f: f32[32] = pack (a, b)", kernel("out", "f", 32), returns="%out"
    )
    verify(make(text, slots={"a": Slot("f", 0), "b": Slot("f", 64)}))
    broken(make(text, slots={"a": Slot("f", 64), "b": Slot("f", 0)}), "V12", "f is written over a")


def test_v12_two_results_of_one_step_share_bytes() -> None:
    writes = "write a[i0] = x[i0]\nwrite b[i0] = x[i0]\n"
    both = "a: f32[16], b: f32[16] = kernel targets (_, _) {\nnest (simd i0: 16) {\n" + writes + "}\n}\n"
    text = program(both, kernel("c", "a"), kernel("d", "b"), returns="%c, %d")
    verify(make(text, arena={"a": 0, "b": 64}))
    broken(make(text, arena={"a": 0, "b": 0}), "V12", "a and b")
    slices = (
        "s: f32[16] = view x (i0: 16) -> [i0]", "t: f32[16] = view x (i0: 16) -> [i0 + {0}]",
        "p: pending in place (r: f32[16], u: f32[16]) = start all_reduce.sum (s, t) @g0[2]",
        "r: f32[16], u: f32[16] = wait p",
    )  # fmt: skip
    coalesced = program(*slices, returns="%r, %u", inputs="x: f32[32]")
    verify(make(coalesced.replace("{0}", "16")))
    broken(make(coalesced.replace("{0}", "8")), "V12", "s and t")


def test_five_thousand_steps_take_about_a_second() -> None:
    rng = random.Random(5)
    steps, flights, waits = [], 0, list[str]()
    for n in range(2500):
        steps.append(kernel(f"a{n}", f"a{n - 1}" if n else "x"))
        if rng.random() < 0.2:
            steps.append(f"p{n}: pending (r{n}: f32[32]) = start all_gather (a{n}) @g0[2]\n")
            waits.append(f"r{n}: f32[32] = wait p{n}\n")
            flights += 1
    text = program(*steps, *waits, *(kernel(f"b{n}", "x") for n in range(5000 - len(steps) - len(waits))), returns="%x")
    starts = [step.split("=")[0].split(":")[0] for step in steps]
    plan = make(text, arena={name: 64 * n for n, name in enumerate(starts) if name.startswith("a")})
    assert len(plan.graph.nodes) == 5000
    assert flights > 400
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        verify(plan, plan.graph)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 2.0, f"{min(seconds):.2f} s"


def test_v15_the_memory_of_an_input_is_taken_while_it_is_needed() -> None:
    text = program(kernel("a", "x", inplace="x"), kernel("out", "a"), returns="%out")
    free = make(text)
    taken = {**free.storages, "a": Storage("a", Home.FRESH, 64, "cpu", donor="x")}
    plan = replace(free, storages=taken, slots={**free.slots, "a": Slot("a")})
    verify(plan)
    read_later = make(program(kernel("a", "x", inplace="x"), kernel("b", "x"), kernel("out", "a"), returns="%out, %b"))
    later = {**read_later.storages, "a": taken["a"]}
    spoilt = replace(read_later, storages=later, slots={**read_later.slots, "a": Slot("a")})
    broken(spoilt, "V15", "a takes the memory of x")
    twice = {**taken, "out": replace(taken["a"], name="out")}
    broken(replace(plan, storages=twice), "V15", "two storages")


def test_every_rule_has_a_seeded_bug_of_its_own() -> None:
    rules = re.findall(r"^- (V\d+) ", inspect.getdoc(verifier) or "", flags=re.MULTILINE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(rules) == 15
    assert [rule for rule in rules if f'"{rule}"' not in tests] == []
