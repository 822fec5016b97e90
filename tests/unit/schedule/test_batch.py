"""Batches of small GPU kernels: who joins, where the batch stands, and that the numbers stay the same."""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.schedule.batch import MOST_MEMBERS, SMALL_BYTES, batch_kernels
from dcompile.schedule.fuse import fuse
from tests.unit.schedule.passes import assert_same_numbers, context


def batched(text: str) -> tuple[Graph, Graph]:
    """The graph before and after, after checking that both give the same numbers."""
    before = fuse(parse_graph(text).check(), context())
    after = batch_kernels(before, context()).check()
    assert_same_numbers(before, after)
    return before, after


def sizes(graph: Graph) -> list[int]:
    """Nests of each kernel, in order."""
    return [len(node.body) for node in graph.nodes if isinstance(node, Kernel)]


def casts(count: int, elements: int = 8, device: str = "@cuda") -> Sequence[str]:
    return [
        f"  c{n}: bf16[{elements + n}]{device} = pointwise (i0: {elements + n}) to_bf16(w{n}[i0])" for n in range(count)
    ]


def program(count: int, elements: int = 8, device: str = "@cuda") -> str:
    inputs = ", ".join(f"w{n}: f32[{elements + n}]{device}" for n in range(count))
    outs = ", ".join(f"%c{n}" for n in range(count))
    return "\n".join([f"graph f({inputs}) {{", *casts(count, elements, device), f"  return {outs}", "}"])


def test_independent_small_kernels_become_one_launch() -> None:
    _, after = batched(program(5))
    assert sizes(after) == [5]


def test_a_batch_is_bounded() -> None:
    _, after = batched(program(MOST_MEMBERS + 3))
    assert sorted(sizes(after)) == [3, MOST_MEMBERS]


def test_large_kernels_and_other_devices_stay_alone() -> None:
    assert sizes(batch_kernels(fuse(parse_graph(program(2, SMALL_BYTES // 6 + 1)), context()), context())) == [1, 1]
    assert sizes(batched(program(3, device=""))[1]) == [1, 1, 1]


def test_casts_move_in_front_of_the_first_product_that_needs_one() -> None:
    _, after = batched("""
graph f(x: bf16[4, 6]@cuda, a: f32[6, 6]@cuda, b: f32[6, 5]@cuda) {
  a16: bf16[6, 6]@cuda = pointwise (i0: 6, i1: 6) to_bf16(a[i0, i1])
  at: bf16[6, 6]{1, 6}@cuda = view a16 (i0: 6, i1: 6) -> [i1, i0]
  y: bf16[4, 6]@cuda = extern aten.mm.default(%x, %at) -> aten.mm.out
  b16: bf16[6, 5]@cuda = pointwise (i0: 6, i1: 5) to_bf16(b[i0, i1])
  z: bf16[4, 5]@cuda = extern aten.mm.default(%y, %b16) -> aten.mm.out
  return %z
}""")
    assert [type(node).__name__ for node in after.nodes] == ["Kernel", "View", "Extern", "Extern"]


def test_who_needs_another_stays_out_of_its_batch() -> None:
    _, after = batched("""
graph f(x: f32[4, 6]@cuda, w: f32[6, 6]@cuda) {
  a: f32[4, 6]@cuda = pointwise (i0: 4, i1: 6) exp(x[i0, i1])
  y: f32[4, 6]@cuda = extern aten.mm.default(%a, %w) -> aten.mm.out
  b: f32[4, 6]@cuda = pointwise (i0: 4, i1: 6) tanh(y[i0, i1])
  z: f32[4, 6]@cuda = extern aten.mm.default(%b, %w) -> aten.mm.out
  return %z, %a
}""")
    assert sizes(after) == [1, 1]


def test_a_kernel_does_not_pass_a_write_of_what_it_reads() -> None:
    _, after = batched("""
graph f(x: f32[8]@cuda, y: f32[9]@cuda) {
  a: f32[8]@cuda = pointwise (i0: 8) exp(x[i0])
  x2: f32[8]@cuda = store set x (i0: 4) [i0] = 1.0:f32
  b: f32[9]@cuda = pointwise (i0: 9) exp(y[i0])
  return %a, %b
}""")
    names = [out.name for node in after.nodes if isinstance(node, Kernel) for out in node.outs]
    assert names.index("x2") > names.index("a")


def test_gradients_are_cast_together_as_soon_as_the_last_of_them_is_there() -> None:
    _, after = batched("""
graph f(g: bf16[4, 6]@cuda, x: bf16[4, 5]@cuda, w: bf16[6, 6]@cuda) {
  gt: bf16[6, 4]{1, 6}@cuda = view g (i0: 6, i1: 4) -> [i1, i0]
  dw: bf16[6, 5]@cuda = extern aten.mm.default(%gt, %x) -> aten.mm.out
  dw32: f32[6, 5]@cuda = pointwise (i0: 6, i1: 5) to_f32(dw[i0, i1])
  g2: bf16[4, 6]@cuda = extern aten.mm.default(%g, %w) -> aten.mm.out
  db: f32[6]@cuda = reduce sum (i0: 6; r0: 4) to_f32(g2[r0, i0])
  g3: bf16[4, 6]@cuda = extern aten.mm.default(%g2, %w) -> aten.mm.out
  return %dw32, %db, %g3
}""")
    assert [type(node).__name__ for node in after.nodes] == ["View", "Extern", "Extern", "Kernel", "Extern"]


def test_second_stages_of_batched_first_stages_come_together_too() -> None:
    _, after = batched("""
graph f(x: f32[8, 6]@cuda, y: f32[8, 5]@cuda) {
  a: f32[2, 6]@cuda = reduce sum (i0: 2, i1: 6; r0: 4) x[4*i0 + r0, i1]
  b: f32[2, 5]@cuda = reduce sum (i0: 2, i1: 5; r0: 4) y[4*i0 + r0, i1]
  c: f32[6]@cuda = reduce sum (i0: 6; r0: 2) a[r0, i0]
  d: f32[5]@cuda = reduce sum (i0: 5; r0: 2) b[r0, i0]
  return %c, %d
}""")
    assert sizes(after) == [2, 2]
