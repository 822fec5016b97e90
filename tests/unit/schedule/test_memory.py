from __future__ import annotations

import pytest

from dcompile.analyse.verify import verify
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug
from dcompile.plan import Home, Plan, Slot
from dcompile.schedule.memory import plan_memory
from tests.unit.schedule.passes import context


def plan_of(text: str) -> Plan:
    plan = plan_memory(parse_graph(text).check(), context())
    verify(plan)
    return plan


def reasons(plan: Plan, subject: str) -> list[str]:
    return [f"{v.decision}: {v.reason}" for v in plan.verdicts if v.subject == subject]


def kernel(out: str, x: str, inplace: str = "") -> str:
    """``out = x * 2`` over 32 floats."""
    into = f" inplace ({inplace})" if inplace else ""
    return f"""{out}: f32[32] = kernel targets (_){into} {{
        nest (serial p0: 32) {{
          write set {out}[p0] = {x}[p0] * 2.0:f32
        }}
      }}
    """


def test_each_storage_has_its_owner() -> None:
    plan = plan_of("""
    graph f(x: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      b: f32[4, 4] = extern aten.relu.default(%a)
      c: f32[4, 4] = extern aten.mm.default(%b, %b) -> aten.mm.out
      return %c
    }""")
    homes = {name: storage.home for name, storage in plan.storages.items()}
    assert homes == {"x": Home.INPUT, "a": Home.ARENA, "b": Home.LIBRARY, "c": Home.FRESH}
    assert plan.frees == {2: ("b",)}
    assert plan.arena_bytes == {"cpu": 64}
    assert plan.peak_bytes == 64 + 64 + 64


def test_buffers_that_never_meet_share_arena_bytes() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      {kernel("a", "x")} {kernel("b", "a")} {kernel("c", "b")} {kernel("d", "c")}
      return %d
    }}""")
    assert plan.storages["a"].arena_offset == plan.storages["c"].arena_offset != plan.storages["b"].arena_offset
    assert plan.arena_bytes == {"cpu": 2 * 32 * 4}


def test_a_kernel_writes_over_an_operand_that_dies_in_it() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      {kernel("a", "x")} {kernel("b", "a", "b: a")} {kernel("c", "b", "c: b")} {kernel("d", "c")}
      return %d
    }}""")
    assert plan.slots["a"] == plan.slots["b"] == plan.slots["c"] == Slot("a")
    assert plan.arena_bytes == {"cpu": 32 * 4}


def test_the_memory_of_inputs_and_outputs_is_not_written_over() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      {kernel("a", "x")} {kernel("b", "x", "b: x")} {kernel("c", "a", "c: a")} {kernel("d", "b", "d: b")}
      return %d, %a, %c
    }}""")
    assert {name: slot.storage for name, slot in plan.slots.items()} == {n: n for n in "xabcd"}
    assert reasons(plan, "b") == ["own memory, not that of x: x belongs to the caller"]
    assert "a is still in use" in reasons(plan, "c")[0]
    assert "b is arena memory and d is fresh memory" in reasons(plan, "d")[0]


def test_an_operand_used_later_keeps_its_memory() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      {kernel("a", "x")} {kernel("b", "a", "b: a")} {kernel("c", "a")}
      d: f32[32] = extern aten.add.Tensor(%b, %c)
      return %d
    }}""")
    assert plan.slots["b"] == Slot("b")
    assert "still in use" in reasons(plan, "b")[0]


def test_an_operand_in_flight_keeps_its_memory() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      {kernel("a", "x")}
      p: pending (r: f32[32]) = start all_reduce.sum (a) @g0[2]
      {kernel("b", "a", "b: a")}
      r: f32[32] = wait p
      d: f32[32] = extern aten.add.Tensor(%b, %r)
      return %d
    }}""")
    offsets = [plan.storages[name].arena_offset for name in ("a", "b", "r")]
    assert len(set(offsets)) == 3


def test_results_in_flight_have_their_bytes_from_the_launch_on() -> None:
    plan = plan_of(f"""
    graph f(x: f32[32]) {{
      p: pending (r: f32[32]) = start all_reduce.sum (x) @g0[2]
      {kernel("a", "x")} {kernel("b", "a")}
      r: f32[32] = wait p
      d: f32[32] = extern aten.add.Tensor(%b, %r)
      return %d
    }}""")
    assert plan.storages["r"].arena_offset not in (plan.storages["a"].arena_offset, plan.storages["b"].arena_offset)


PACKED = """
graph f(x: f32[4, 4]) {
  a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
  b: f32[4, 4] = extern aten.mm.default(%a, %x) -> aten.mm.out
  f: f32[16] = view b (i0: 16) -> [i0 // 4, i0 % 4]
  k: f32[32] = pack (PARTS)
  p: pending in place (r: f32[32]) = start all_reduce.sum (k) @g0[2]
  r: f32[32] = wait p
  y: f32[4, 4] = view r (i0: 4, i1: 4) -> [4*i0 + i1 + 16]
  z: f32[4, 4] = extern aten.relu.default(%y)
  return %z, RETURNED
}"""


def test_parts_that_die_in_a_pack_are_computed_in_their_place() -> None:
    plan = plan_of(PACKED.replace("PARTS", "a, f").replace("RETURNED", "%x"))
    assert [plan.slots[name] for name in ("a", "b", "f", "k", "r", "y")] == [
        Slot("a", 0), Slot("a", 64), Slot("a", 64), Slot("a", 0), Slot("a", 0), Slot("a", 64)
    ]  # fmt: skip
    assert plan.arena_bytes == {"cpu": 128}
    assert reasons(plan, "k") == ["2 of 2 parts in place, 0 copied: every part is dead after the pack"]


def test_a_pack_that_is_returned_holds_its_parts_too() -> None:
    plan = plan_of(PACKED.replace("PARTS", "a, f").replace("RETURNED", "%r"))
    assert plan.storages["a"].home is Home.FRESH
    assert plan.slots["f"] == Slot("a", 64)
    assert plan.frees == {}


def test_a_part_packed_twice_is_copied_the_second_time() -> None:
    plan = plan_of(PACKED.replace("PARTS", "b, b").replace("RETURNED", "%x"))
    assert plan.slots["b"].storage == plan.slots["k"].storage
    assert (plan.slots["b"].offset, plan.slots["k"].offset) == (0, 0)
    assert reasons(plan, "k") == ["1 of 2 parts in place, 1 copied: b is packed before"]


def test_parts_that_share_memory_are_copied() -> None:
    plan = plan_of(PACKED.replace("PARTS", "b, f").replace("RETURNED", "%x"))
    assert plan.slots["b"] == plan.slots["f"] == Slot("b")
    assert "0 of 2 parts in place" in reasons(plan, "k")[0]


def test_inputs_outputs_and_strided_parts_are_copied() -> None:
    plan = plan_of("""
    graph f(x: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      b: f32[4, 4] = extern aten.mm.default(%a, %x) -> aten.mm.out
      t: f32[4, 4]{1, 4} = view b (i0: 4, i1: 4) -> [i1, i0]
      c: f32[4, 4] = extern aten.relu.default(%a)
      k: f32[64] = pack (x, a, t, c)
      return %a, %k
    }""")
    found = reasons(plan, "k")[0]
    for part in ("x lives in input", "a is used after", "t is not row-major", "c lives in library"):
        assert part in found


def test_a_part_used_after_the_pack_is_copied() -> None:
    plan = plan_of("""
    graph f(x: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      k: f32[16] = pack (a)
      b: f32[4, 4] = extern aten.relu.default(%a)
      return %k, %b
    }""")
    assert plan.slots["a"].storage == "a"
    assert reasons(plan, "k") == ["0 of 1 parts in place, 1 copied: a is used after the pack"]


def test_a_pack_inside_a_pack() -> None:
    plan = plan_of("""
    graph f(x: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      b: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
      k: f32[16] = pack (b)
      l: f32[32] = pack (a, k)
      c: f32[32] = extern aten.relu.default(%l)
      return %c
    }""")
    assert [plan.slots[n] for n in "abkl"] == [Slot("a", 0), Slot("a", 64), Slot("a", 64), Slot("a", 0)]


def test_symbolic_sizes_are_allocated_by_the_program_and_freed_after_their_last_use() -> None:
    plan = plan_of("""
    graph f(s0: size = 3, x: f32[s0, 4]) {
      a: f32[s0, 4] = extern aten.relu.default(%x) -> aten.relu.out
      b: f32[s0, 4] = extern aten.tanh.default(%a) -> aten.tanh.out
      c: f32[s0, 4] = extern aten.tanh.default(%b) -> aten.tanh.out
      return %c
    }""")
    assert {n: plan.storages[n].home for n in "abc"} == dict.fromkeys("abc", Home.FRESH)
    assert plan.frees == {1: ("a",), 2: ("b",)}
    assert plan.arena_bytes == {}
    assert plan.peak_bytes == 2 * 3 * 4 * 4


def test_empty_tensors_take_no_bytes() -> None:
    plan = plan_of("""
    graph f(x: f32[0, 4]) {
      a: f32[0, 4] = extern aten.tanh.default(%x) -> aten.tanh.out
      k: f32[0] = pack (a)
      b: f32[0, 4] = extern aten.tanh.default(%a) -> aten.tanh.out
      return %b, %k
    }""")
    assert plan.peak_bytes == 0


def test_a_view_no_strides_can_express_is_a_bug_of_an_earlier_stage() -> None:
    with pytest.raises(CompilerBug, match=r"view t of a \(model.py:3\)"):
        plan_of("""
        graph f(x: f32[4, 4]) {
          a: f32[4, 4] = extern aten.mm.default(%x, %x) -> aten.mm.out
          t: f32[4, 4] = view a (i0: 4, i1: 4) -> [3 - i0, i1]  # aten.flip.default @model.py:3
          return %t
        }""")


def test_the_arena_of_a_long_chain_stays_close_to_what_is_alive() -> None:
    rows = [f"t{n + 1}: f32[{8 + n % 5}, 8] = extern aten.mm.default(%x, %t{n}) -> aten.mm.out" for n in range(60)]
    text = "graph f(x: f32[8, 8], t0: f32[8, 8]) {\n" + "\n".join(rows) + "\nreturn %t60\n}"
    plan = plan_of(text)
    largest = 12 * 8 * 4
    assert plan.arena_bytes["cpu"] <= 2 * largest
