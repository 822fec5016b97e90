from __future__ import annotations

import re
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from dcompile.codegen.cpp import CppModule
from dcompile.codegen.wrapper import print_host
from dcompile.collectives.nodes import Start, Wait
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug, DCompileError
from dcompile.ir.graph import Graph, hint
from dcompile.ir.types import Value
from dcompile.reference import run_reference
from dcompile.runtime.externs import HELPERS
from dcompile.runtime.program import Executable
from dcompile.schedule.overlap import overlap
from tests.adversary import Touched, World
from tests.unit.codegen.programs import functions_of, host_of, plan_of, program
from tests.unit.runtime.blocks import waiting_blocks
from tests.unit.schedule.passes import context, random_inputs

OVERLAPPED = """
graph f(x: f32[4, 6], w: f32[6, 5]) {
  e: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1])                      # aten.exp.default @m.py:3
  y: f32[4, 5] = extern aten.mm.default(%e, %w) -> aten.mm.out                # aten.mm.default @m.py:4
  p: pending in place (g: f32[4, 5]) = start all_reduce.sum (y) @g0[2]        # c10d.all_reduce @m.py:5
  z: f32[4, 5] = extern aten.mm.default(%x, %w) -> aten.mm.out                # aten.mm.default @m.py:6
  g: f32[4, 5] = wait p                                                       # c10d.wait @m.py:5
  h: f32[4, 5] = pointwise (i0: 4, i1: 5) g[i0, i1] + z[i0, i1]               # aten.add.Tensor @m.py:7
  q: f32[5, 4] = view h (i0: 5, i1: 4) -> [i1, i0]
  return %q, %h, none, 3, 2.5
}
"""


def copies(inputs: list[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def at_hints(graph: Graph) -> Graph:
    """``graph`` with inputs of the sizes seen while tracing."""

    def static(sizes: Any) -> tuple[int, ...]:
        return tuple(hint(size, graph.size_hints) for size in sizes)

    inputs = tuple(
        replace(item, shape=static(item.shape), stride=static(item.stride)) if isinstance(item, Value) else item
        for item in graph.inputs
    )
    return replace(graph, inputs=inputs)


def check(text: str | Graph, calls: int = 2, **tolerance: float) -> list[Any]:
    """A one-rank program against the reference interpreter, several times; the last outputs."""
    graph = parse_graph(text) if isinstance(text, str) else text
    run = program(graph)
    found: list[Any] = []
    for call in range(calls):
        inputs = random_inputs(at_hints(graph), call)
        mine, theirs = copies(inputs), copies(inputs)
        boxed = list(mine)
        found = run(boxed)
        assert boxed == []
        expected = run_reference([graph], [theirs])[0]
        for a, b in zip([*found, *mine], [*expected, *theirs], strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                assert a.stride() == b.stride()
            else:
                assert a == b
    return found


def test_the_text_has_a_line_a_step_with_origin() -> None:
    text, _ = host_of(plan_of(OVERLAPPED))
    steps = [line.strip() for line in text.splitlines() if "# " in line and line.startswith("        ")]
    assert [re.sub(r"\(.*\)", "()", step) for step in steps[-6:]] == [
        "if rc := k0_exp():  # aten.exp at m.py:3",
        "mm_out()  # aten.mm at m.py:4",
        "p = start()  # 2 ranks c10d.all_reduce at m.py:5",
        "mm_out()  # aten.mm at m.py:6",
        "wait()  # c10d.wait at m.py:5",
        "if rc := k1_add():  # aten.add.Tensor at m.py:7",
    ]


def test_views_returned_beside_their_base_are_aliases() -> None:
    comm = World(1, ranks=2).comm()
    run = program(OVERLAPPED, comm)
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    q, h, nothing, three, half = run([x, w])
    torch.testing.assert_close(h, 2 * (x.exp() @ w) + x @ w)
    assert torch.equal(q, h.t())
    assert q.data_ptr() == h.data_ptr()
    assert q.stride() == (1, 5)
    assert not q._is_view()
    assert (nothing, three, half) == (None, 3, 2.5)
    assert comm.waited == ["p = all_reduce.sum at m.py:5"]


def test_results_stay_when_the_program_runs_again() -> None:
    run = program(OVERLAPPED, World(1, ranks=2).comm())
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    first = run([x, w])[1]
    kept = first.clone()
    run([torch.randn(4, 6), w])
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            """graph f(x: f32[3, 4]) {
              t: f32[4, 3] = view x (i0: 4, i1: 3) -> [i1, i0]
              u: f32[2, 3] = view t (i0: 2, i1: 3) -> [i0 + 1, i1]
              return %t, %u, %x
            }""",
            id="views of an input",
        ),
        pytest.param(
            """graph f(x: f32[3, 4]) {
              y: f32[3, 4] = store set x (i0: 3) [i0, 1] = 7.0:f32
              t: f32[4, 3] = view y (i0: 4, i1: 3) -> [i1, i0]
              return %y, %t
            }""",
            id="an input written",
        ),
        pytest.param(
            """graph f(x: f32[3, 4], y: f32[5]) {
              a: f32[3, 4] = pointwise (i0: 3, i1: 4) x[i0, i1] * x[i0, i1]
              p: f32[22] = pack (a, y, y)
              b: f32[5] = view p (i0: 5) -> [i0 + 12]
              c: f32[22] = pointwise (i0: 22) p[i0] + 1.0:f32
              return %c, %b
            }""",
            id="pack",
        ),
        pytest.param(
            """graph f(x: f32[3, 4]) {
              v: f32[3], j: i64[3] = extern aten.max.dim(%x, 1) seq
              n: f32[3, 4] = extern aten.neg.default(%x)
              m: f32[3, 4] = pointwise (i0: 3, i1: 4) n[i0, i1] - v[i0]
              t: f32[4, 3]{1, 4} = extern aten.t.default(%m) aliases (m)
              s: f32[4, 3] = pointwise (i0: 4, i1: 3) t[i0, i1] * t[i0, i1]
              return %m, %s, %j
            }""",
            id="library calls",
        ),
        pytest.param(
            """graph f(x: f32[6, 7]) {
              s: f32[6, 3], i: i64[6, 3] = extern aten.topk.default(%x, 3, 1) -> aten.topk.values seq
              e: f32[6, 3] = pointwise (i0: 6, i1: 3) exp(s[i0, i1])
              return %e, %i
            }""",
            id="out overload with two results",
        ),
        pytest.param(
            """graph f(n: size = 5, x: f32[n, 4]) {
              a: f32[n, 4] = pointwise (i0: n, i1: 4) exp(x[i0, i1])
              b: f32[n] = reduce sum (i0: n; r0: 4) a[i0, r0]
              c: f32[4, n]{1, 4} = extern aten.t.default(%a) aliases (a)
              d: f32[n, n] = extern aten.mm.default(%a, %c) -> aten.mm.out
              return %b, %d, 2*n + 1
            }""",
            id="dynamic",
        ),
        pytest.param(
            """graph f(x: f32[0, 4], y: f32[3]) {
              a: f32[0, 4] = pointwise (i0: 0, i1: 4) exp(x[i0, i1])
              s: f32[4] = reduce sum (i0: 4; r0: 0) a[r0, i0]
              p: f32[3] = pack (a, y)
              return %a, %s, %p
            }""",
            id="empty",
        ),
        pytest.param("graph f(x: f32[2], class: f32[2], call: f32[2]) { return %call, %class }", id="no steps"),
        pytest.param("graph f() { return none, 3 }", id="nothing"),
        pytest.param(
            """graph f(rt: f32[2], `a.b`: f32[2]) {
              inputs: f32[2] = extern aten.add.Tensor(%rt, %`a.b`)
              lambda: f32[2] = extern aten.mul.Tensor(%inputs, %inputs)
              return %lambda
            }""",
            id="names that mean something",
        ),
    ],
)
def test_programs_equal_the_reference(text: str) -> None:
    check(text)


def test_dynamic_sizes_change_from_call_to_call() -> None:
    graph = parse_graph(
        """graph f(n: size = 5, x: f32[n, 4]) {
          a: f32[n, 4] = pointwise (i0: n, i1: 4) x[i0, i1] + 1.0:f32
          return %a, n // 2
        }"""
    )
    run = program(graph)
    for size in (5, 0, 9, 1):
        x = torch.randn(size, 4)
        a, half = run([size, x])
        assert torch.equal(a, x + 1)
        assert half == size // 2


def test_seeds_come_from_the_default_generator() -> None:
    run = program("graph f() { s: i64[4] = extern dcompile.seeds(4) effect\n return %s }")
    torch.manual_seed(3)
    first, second = run([])[0], run([])[0]
    torch.manual_seed(3)
    assert torch.equal(run([])[0], first)
    assert not torch.equal(first, second)
    assert first.shape == (4,)
    assert first.dtype is torch.int64


def test_an_index_out_of_range_names_the_line_and_waits_for_what_flies() -> None:
    graph = parse_graph(
        """graph f(x: f32[4], j: i64[3], g: f32[4]) {
          p: pending (s: f32[4]) = start all_reduce.sum (g) @g0[2]
          y: f32[3] = pointwise (i0: 3) x[q0 | q0 = wrap_index(j[i0], 4:i64)]  # aten.index.Tensor @m.py:9
          s: f32[4] = wait p
          return %y, %s
        }"""
    )
    comm = World(1, ranks=2).comm()
    run = program(graph, comm)
    x, g = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(run([x, torch.tensor([1, -1, 3]), g])[0], x[[1, 3, 3]])
    with pytest.raises(IndexError, match=r"index out of range in aten\.index\.Tensor at m\.py:9"):
        run([x, torch.tensor([1, 4, 3]), g])
    assert len(comm.launched) == len(comm.waited) == 2
    assert not comm.flying
    torch.testing.assert_close(run([x, torch.tensor([0, 0, 0]), g])[1], 2 * g)


def test_division_by_zero_is_reported() -> None:
    run = program(
        """graph f(x: i64[3], y: i64[3]) {
          q: i64[3] = pointwise (i0: 3) floordiv(x[i0], y[i0])  # aten.floor_divide.default @m.py:2
          return %q
        }"""
    )
    x = torch.tensor([7, -7, 5])
    assert run([x, torch.tensor([2, 2, 5])])[0].tolist() == [3, -4, 1]
    with pytest.raises(ZeroDivisionError, match=r"aten\.floor_divide at m\.py:2"):
        run([x, torch.tensor([2, 0, 5])])


def test_inputs_of_other_layouts_are_copied_or_refused() -> None:
    run = program(OVERLAPPED, World(1, ranks=2).comm())
    x, w = torch.randn(6, 4).t(), torch.randn(6, 5)
    torch.testing.assert_close(run([x, w])[1], 2 * (x.exp() @ w) + x @ w)
    raw = torch.zeros(4 * 6 * 4 + 1, dtype=torch.uint8)
    odd = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1, count=24).view(4, 6).copy_(torch.randn(4, 6))
    assert odd.data_ptr() % 4
    torch.testing.assert_close(run([odd, w])[1], 2 * (odd.exp() @ w) + odd @ w)
    for wrong in (torch.randn(4, 7), torch.randn(4, 6).double(), torch.randn(24)):
        with pytest.raises(DCompileError, match="input x must be float32"):
            run([wrong, w])
    writes = program("graph f(x: f32[3, 4]) { y: f32[3, 4] = store set x (i0: 3) [i0, 1] = 7.0:f32\n return %y }")
    with pytest.raises(DCompileError, match="written in place"):
        writes([torch.randn(4, 3).t()])


def test_a_library_result_of_another_layout_is_a_compiler_bug() -> None:
    run = program("graph f(x: f32[3, 4]) { y: f32[4, 3] = extern aten.neg.default(%x)  # n @m.py:8\n return %y }")
    with pytest.raises(CompilerBug, match=r"aten\.neg\.default at m\.py:8 gave float32\[3, 4\]"):
        run([torch.randn(3, 4)])


def test_inputs_are_freed_after_their_last_use() -> None:
    seen: list[object] = []
    graph = parse_graph(
        """graph f(x: f32[3], y: f32[3]) {
          a: f32[3] = extern aten.neg.default(%x)
          extern dcompile.spy(%y) effect
          return %a
        }"""
    )
    x, y = torch.randn(3), torch.randn(3)
    alive = weakref.ref(x)
    HELPERS["dcompile.spy"] = lambda _: seen.append(alive())
    try:
        boxed = [x, y]
        run = program(graph)
        del x
        run(boxed)
    finally:
        del HELPERS["dcompile.spy"]
    assert seen == [None]


def test_calls_from_several_threads_do_not_share_memory() -> None:
    run = program(
        """graph f(x: f32[64, 64]) {
          a: f32[64, 64] = extern aten.mm.default(%x, %x) -> aten.mm.out
          b: f32[64, 64] = extern aten.mm.default(%a, %x) -> aten.mm.out
          c: f32[64, 64] = extern aten.mm.default(%a, %b) -> aten.mm.out
          d: f32[64, 64] = extern aten.mm.default(%c, %b) -> aten.mm.out
          return %d
        }"""
    )
    inputs = [torch.randn(64, 64) / 8 for _ in range(3)]
    expected = [run([x])[0] for x in inputs]
    wrong: list[int] = []

    def main(n: int) -> None:
        for _ in range(50):
            if not torch.equal(run([inputs[n]])[0], expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=main, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    waiting = waiting_blocks(run)
    assert len({block.base["cpu"] for block in waiting}) == len(waiting) <= 3


ALL_KINDS = """
graph f(x: f32[4, 6], w: f32[6, 6]) {
  a: f32[4, 6] = extern aten.mm.default(%x, %w) -> aten.mm.out
  p0: pending in place (a1: f32[4, 6]) = start all_reduce.sum (a) @g0[2]
  b: f32[4, 6] = pointwise (i0: 4, i1: 6) tanh(x[i0, i1])
  p1: pending (b1: f32[8, 6]) = start all_gather (b) @g0[2]
  c: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] * x[i0, i1]
  p2: pending (c1: f32[2, 6], d1: f32[2, 6]) = start reduce_scatter.avg (c, x) @g0[2]
  p3: pending (e1: f32[4, 6]) = start all_to_all (b) @g0[2]
  p4: pending (f1: f32[6, 6]) = start broadcast (w) @g0[2] root 1
  a1: f32[4, 6] = wait p0
  b1: f32[8, 6] = wait p1
  c1: f32[2, 6], d1: f32[2, 6] = wait p2
  e1: f32[4, 6] = wait p3
  f1: f32[6, 6] = wait p4
  r: f32[4, 6] = pointwise (i0: 4, i1: 6) a1[i0, i1] + b1[i0 + 4, i1] + c1[i0 // 2, i1] + e1[i0, i1] + f1[i0, i1]
  return %r, %b1, %d1
}
"""


@pytest.mark.parametrize("ordered", [False, True], ids=["program order", "scheduled"])
def test_all_kinds_on_two_ranks_under_the_adversary(ordered: bool) -> None:
    graph = parse_graph(ALL_KINDS)
    inputs = [random_inputs(graph, seed) for seed in (1, 2)]
    expected = run_reference([graph, graph], [copies(i) for i in inputs])
    plan = plan_of(graph)
    if ordered:
        plan = plan_of(overlap(plan.graph, context()))
    world = World(2)
    ranks = [program(plan, world.comm(rank)) for rank in range(2)]
    for _ in range(2):
        found = world.run([lambda n=n: ranks[n](copies(inputs[n])) for n in range(2)])  # type: ignore[misc]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_adversary_catches_a_touch_in_flight(in_place: bool) -> None:
    how = "in place " if in_place else ""
    plan = plan_of(
        f"""graph f(x: f32[4], y: f32[4]) {{
          a: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
          p: pending {how}(g: f32[4]) = start all_reduce.sum (a) @g0[2]
          g: f32[4] = wait p
          b: f32[4] = store set y (i0: 2) [i0] = g[i0]
          return %b, %g
        }}"""
    )
    good, module = host_of(plan)
    lines = good.splitlines()
    start = next(n for n, line in enumerate(lines) if "p = start(" in line)
    touched = re.search(r"start\('all_reduce', \((\w+),\), \((\w+),\)", lines[start])
    assert touched is not None
    lines.insert(
        start + 1, f"        {touched[1]}.mul_(1.0).add_(1.0)" if not in_place else f"        {touched[1]}.zero_()"
    )
    functions = functions_of(module)
    x, y = torch.randn(4), torch.randn(4)
    fine = Executable(good, "f", functions, World(1, ranks=2).comm())
    torch.testing.assert_close(fine([x, y.clone()])[1], 2 * (x + 1))
    with pytest.raises(Touched, match="written while in flight"):
        Executable("\n".join(lines), "f", functions, World(1, ranks=2).comm())([x, y.clone()])


def test_a_graph_that_is_not_finished_is_refused() -> None:
    plan = plan_of("graph f(x: f32[4]) { y: f32[4] = extern aten.neg.default(%x)\n return %y }")
    loops = parse_graph("graph f(x: f32[4]) { y: f32[4] = pointwise (i0: 4) exp(x[i0])\n return %y }")
    with pytest.raises(CompilerBug, match="Pointwise is no step"):
        print_host(replace(plan, graph=loops), CppModule(""))
    assert not any(isinstance(node, Start | Wait) for node in plan.graph.nodes)
