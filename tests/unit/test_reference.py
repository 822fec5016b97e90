from __future__ import annotations

import hypothesis
import pytest
import torch

from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug, Divergence
from dcompile.ir.graph import Graph
from dcompile.reference import run_reference
from tests.strategies import assert_same, copy_inputs, graphs, random_inputs


def _run(text: str, *inputs: torch.Tensor | int) -> list[object]:
    return list(run_reference([parse_graph(text)], [list(inputs)])[0])


def _equal(found: object, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_pointwise_with_gather_mask_and_broadcast() -> None:
    x, table, idx = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([4, -1, 2])
    found = _run(
        """graph g(x: f32[3, 4], table: f32[5, 4], idx: i64[3]) {
          a: f32[3, 4] = pointwise (i0: 3, i1: 4) x[i0, i1] * table[q0, i1 | q0 = wrap_index(idx[i0], 5:i64)]
          b: f32[3, 6] = pointwise (i0: 3, i1: 6) masked(index(i1) < 4:i64, x[i0, i1], -1.0:f32)
          c: f32[4, 3] = pointwise (i0: 4, i1: 3) x[i1, i0] + x[0, i0] + to_f32(index(2*i0 + i1))
          return %a, %b, %c }""",
        x, table, idx,
    )  # fmt: skip
    _equal(found[0], x * table[idx])
    _equal(found[1], torch.nn.functional.pad(x, (0, 2), value=-1.0))
    _equal(found[2], x.t() + x[0][:, None] + (2 * torch.arange(4)[:, None] + torch.arange(3)).float())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sum", lambda x: x.sum((0, 2))),
        ("prod", lambda x: x.prod(2).prod(0)),
        ("max", lambda x: x.amax((0, 2))),
        ("min", lambda x: x.amin((0, 2))),
        ("argmax", lambda x: x.transpose(0, 1).reshape(3, 8).argmax(1)),
        ("argmin", lambda x: x.transpose(0, 1).reshape(3, 8).argmin(1)),
    ],
)
def test_reductions_are_row_major_over_their_axes(kind: str, expected: object) -> None:
    x = torch.randn(2, 3, 4)
    dtype = "i64" if kind.startswith("arg") else "f32"
    found = _run(
        f"graph g(x: f32[2, 3, 4]) {{ y: {dtype}[3] = reduce {kind} (i0: 3; r0: 2, r1: 4) x[r0, i0, r1] return %y }}", x
    )
    _equal(found[0], expected(x))  # type: ignore[operator]


def test_reductions_of_nothing_give_the_neutral_element() -> None:
    text = "graph g(x: f32[0]) {" + "".join(
        f"y{n}: f32[] = reduce {kind} (; r0: 0) x[r0] " for n, kind in enumerate(("sum", "prod", "max", "min"))
    )
    found = _run(text + "return %y0, %y1, %y2, %y3 }", torch.empty(0))
    assert [float(x) for x in found] == [0.0, 1.0, -float("inf"), float("inf")]  # type: ignore[arg-type]


def test_nan_wins_every_comparison() -> None:
    x = torch.tensor([1.0, float("nan"), 3.0, float("nan")])
    found = _run(
        """graph g(x: f32[4]) { a: f32[] = reduce max (; r0: 4) x[r0]
        b: i64[] = reduce argmin (; r0: 4) x[r0]
        c: f32[4] = pointwise (i0: 4) maximum(x[i0], 2.0:f32)
        d: f32[4] = pointwise (i0: 4) fmax(x[i0], 2.0:f32) return %a, %b, %c, %d }""",
        x,
    )
    assert torch.isnan(found[0])  # type: ignore[arg-type]
    assert int(found[1]) == 1  # type: ignore[call-overload]
    _equal(found[2], torch.tensor([2.0, float("nan"), 3.0, float("nan")]))
    _equal(found[3], torch.tensor([2.0, 2.0, 3.0, 2.0]))


def test_views_and_versions_share_storage_and_copies_do_not() -> None:
    x = torch.randn(4, 6)
    before = x.clone()
    found = _run(
        """graph g(x: f32[4, 6]) {
          t: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
          s: f32[2, 3]{12, 2} = view x (i0: 2, i1: 3) -> [2*i0 + 1, 2*i1]
          f: f32[24] = view t (i0: 24) -> [i0 // 4, i0 % 4]
          x1: f32[4, 6] = store add x (i0: 4) [i0, 5] = x[i0, 0]
          return %x1, %t, %s, %f }""",
        x,
    )
    expected = before.clone()
    expected[:, 5] += before[:, 0]
    _equal(x, expected)
    assert found[0].data_ptr() == x.data_ptr()  # type: ignore[union-attr,attr-defined]
    _equal(found[1], expected.t())
    _equal(found[2], expected[1::2, ::2])
    _equal(found[3], before.t().reshape(-1))


def test_store_adds_repeated_positions() -> None:
    x, idx, y = torch.randn(3), torch.tensor([1, 1, 2, 1]), torch.randn(4)
    expected = x.index_add(0, idx, y)
    found = _run(
        """graph g(x: f32[3], idx: i64[4], y: f32[4]) {
          x1: f32[3] = store add x (i0: 4) [q0 | q0 = idx[i0]] = y[i0] return %x1 }""",
        x, idx, y,
    )  # fmt: skip
    _equal(found[0], expected)


def test_symbolic_sizes_take_the_value_given() -> None:
    x = torch.randn(5, 3)
    text = """graph g(s0: size = 8, x: f32[s0, 3]) {
      y: f32[3] = reduce sum (i0: 3; r0: s0) x[r0, i0]
      z: f32[3*s0] = view x (i0: 3*s0) -> [i0 // 3, i0 % 3]
      return %y, %z, s0 // 2 + 1 }"""
    found = _run(text, 5, x)
    _equal(found[0], x.sum(0))
    _equal(found[1], x.reshape(-1))
    assert found[2] == 3
    with pytest.raises(ValueError, match=r"x is declared f32\[6, 3\]"):
        _run(text, 6, x)


SOFTMAX = """
graph g(x: f32[4, 16], y: f32[4, 16]) {
  total: f32[4], y1: f32[4, 16] = kernel targets (_, y) {
    nest (ROLE i0: 4) {
      scratch row: f32[16]
      fold (serial r0: 16) top = max x[16*i0 + r0]
      fold (simd r0: 16) {
        let e = exp(x[16*i0 + r0] - top)
        a = sum e
        k = argmax e
        write row[r0] = e
      }
      nest (simd i1: 16) { write add y1[16*i0 + i1 | q0 = k] = row[i1] / a }
      nest (serial j0: 2, simd j1: 3) { write add y1[16*i0 + q0 | q0 = k] = 1.0:f32 }
      write total[i0] = a
    }
  }
  return %total, %y1 }
"""


@pytest.mark.parametrize("role", ["parallel", "serial", "simd"])
def test_kernel_statements(role: str) -> None:
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    e = torch.exp(x - x.amax(1, keepdim=True))
    expected = y + e / e.sum(1, keepdim=True)
    expected[torch.arange(4), x.argmax(1)] += 6.0  # 2 serial times 3 simd iterations, each adds
    found = _run(SOFTMAX.replace("ROLE", role), x, y)
    _equal(found[0], e.sum(1))
    _equal(found[1], expected)
    _equal(y, expected)


def test_memory_never_written_is_nan_and_out_of_range_is_an_error() -> None:
    kernel = "graph g(x: f32[4]) { y: f32[4] = kernel { nest (simd i0: 3) { write y[i0] = x[INDEX] } } return %y }"
    x = torch.randn(4)
    (found,) = _run(kernel.replace("INDEX", "i0 + 1"), x)
    _equal(found, torch.cat([x[1:], torch.tensor([float("nan")])]))
    with pytest.raises(CompilerBug, match=r"x is touched at 4, outside 0\.\.3"):
        _run(kernel.replace("INDEX", "i0 + 2"), x)
    with pytest.raises(CompilerBug, match="x is touched at -1"):
        _run("graph g(x: f32[4]) { y: f32[4] = pointwise (i0: 4) x[i0 - 1] return %y }", x)
    gather = "y: f32[4] = pointwise (i0: 4) x[q0 | q0 = wrap_index(index(i0 + 1), 4:i64)]"
    with pytest.raises(IndexError, match="index 4 for size 4"):
        _run(f"graph g(x: f32[4]) {{ {gather} return %y }}", x)
    with pytest.raises(ZeroDivisionError):
        _run("graph g() { y: i64[4] = pointwise (i0: 4) 7:i64 // index(i0) return %y }")


def test_masked_bodies_are_not_evaluated() -> None:
    found = _run(
        "graph g() { y: i64[4] = pointwise (i0: 4) masked(index(i0) > 0:i64, 7:i64 // index(i0), -1:i64) return %y }"
    )
    assert found[0].tolist() == [-1, 7, 3, 2]  # type: ignore[union-attr,attr-defined]


def test_library_calls() -> None:
    x, y = torch.randn(3, 4), torch.randn(4)
    text = """graph g(x: f32[3, 4], y: f32[4]) {
      v: f32[3, 2], i: i64[3, 2] = extern aten.topk.default(%x, 2, -1, true, true) seq
      t: f32[4, 3]{1, 4} = extern aten.t.default(%x) aliases (x)
      h: f16[3, 4] = extern aten._to_copy.default(%x, dtype = <dtype "f16">)
      extern aten.mul_.Tensor(%y, 2.0) writes (y) versions (y1: f32[4])
      s: i64[5] = extern dcompile.seeds(5) effect
      return %v, %i, %t, %h, %y1, %s }"""
    doubled = y * 2
    torch.manual_seed(3)
    v, i, t, h, y1, s = _run(text, x, y)
    _equal(v, x.topk(2).values)
    _equal(i, x.topk(2).indices)
    assert t.data_ptr() == x.data_ptr()  # type: ignore[union-attr,attr-defined]
    _equal(h, x.half())
    _equal(y1, doubled)
    torch.manual_seed(3)
    _equal(s, torch.randint(-(2**63), 2**63 - 1, (5,)))
    with pytest.raises(CompilerBug, match="returned memory of an operand"):
        _run("graph g(x: f32[3, 4]) { t: f32[4, 3]{1, 4} = extern aten.t.default(%x) return %t }", x)
    with pytest.raises(CompilerBug, match="declared f32"):
        _run("graph g(x: f32[3, 4]) { t: f32[3, 4] = extern aten.t.default(%x) return %t }", x)


COLLECTIVE = """graph g(x: f32[4, 3]) {{
  p: pending {place}(y: f32[{rows}, 3]) = start {kind} (x) @g0[2]{root}
  y: f32[{rows}, 3] = wait p
  return %y }}"""


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("all_reduce.sum", 4, lambda a, b: (a + b, a + b)),
        ("all_reduce.avg", 4, lambda a, b: ((a + b) / 2, (a + b) / 2)),
        ("all_reduce.product", 4, lambda a, b: (a * b, a * b)),
        ("all_reduce.max", 4, lambda a, b: (torch.maximum(a, b),) * 2),
        ("all_gather", 8, lambda a, b: (torch.cat([a, b]),) * 2),
        ("reduce_scatter.sum", 2, lambda a, b: ((a + b)[:2], (a + b)[2:])),
        ("broadcast", 4, lambda a, b: (b, b)),
        ("all_to_all", 4, lambda a, b: (torch.cat([a[:2], b[:2]]), torch.cat([a[2:], b[2:]]))),
    ],
)
def test_collectives(kind: str, rows: int, expected: object) -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    wanted = expected(a.clone(), b.clone())  # type: ignore[operator]
    root = " root 1" if kind == "broadcast" else ""
    graph = parse_graph(COLLECTIVE.format(place="", kind=kind, rows=rows, root=root))
    found = run_reference([graph, graph], [[a.clone()], [b.clone()]])
    for rank in (0, 1):
        _equal(found[rank][0], wanted[rank])
    if kind.startswith(("all_reduce", "broadcast")):
        graph = parse_graph(COLLECTIVE.format(place="in place ", kind=kind, rows=rows, root=root))
        run_reference([graph, graph], [[a], [b]])
        _equal(a, wanted[0])
        _equal(b, wanted[1])


def test_groups_partition_the_ranks() -> None:
    graph = parse_graph(COLLECTIVE.format(place="", kind="all_reduce.sum", rows=4, root=""))
    inputs = [torch.randn(4, 3) for _ in range(4)]
    found = run_reference([graph] * 4, [[x] for x in inputs], {"g0": [[0, 2], [3, 1]]})
    for rank, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        _equal(found[rank][0], inputs[rank] + inputs[other])


def test_ranks_that_disagree_are_an_error() -> None:
    first = parse_graph(COLLECTIVE.format(place="", kind="all_reduce.sum", rows=4, root=""))
    other = parse_graph(COLLECTIVE.format(place="", kind="all_reduce.max", rows=4, root=""))
    none = parse_graph("graph g(x: f32[4, 3]) { return %x }")
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(Divergence, match="rank 0 launches p as"):
        run_reference([first, other], [[x], [y]])
    with pytest.raises(Divergence, match=r"rank 0 waits in p \(all_reduce over g0\); rank 1 has ended"):
        run_reference([first, none], [[x], [y]])
    with pytest.raises(Divergence, match="group of 2, but g0 has 1 members"):
        run_reference([first], [[x]])


IN_FLIGHT = """graph g(x: f32[4], y: f32[4]) {{
  p: pending {place}(r: f32[4]) = start all_reduce.sum (x) @g0[1]
  {between}
  r: f32[4] = wait p
  return %r, %z }}"""


def test_reading_a_buffer_in_flight_gives_nan() -> None:
    between = "z: f32[4] = pointwise (i0: 4) x[i0]"
    x, y = torch.randn(4), torch.randn(4)
    read = _run(IN_FLIGHT.format(place="", between=between), x.clone(), y)
    _equal(read[1], x)
    read = _run(IN_FLIGHT.format(place="in place ", between=between), x.clone(), y)
    assert bool(torch.isnan(read[1]).all())  # type: ignore[arg-type]
    _equal(read[0], x)


@pytest.mark.parametrize(("place", "message"), [("", "x, a source of p,"), ("in place ", "a result of p")])
def test_writing_a_buffer_in_flight_is_an_error(place: str, message: str) -> None:
    between = "z: f32[4] = store set x (i0: 4) [i0] = y[i0]"
    with pytest.raises(CompilerBug, match=f"{message} was written in flight"):
        _run(IN_FLIGHT.format(place=place, between=between), torch.randn(4), torch.randn(4))


def test_a_launch_without_wait_is_an_error() -> None:
    text = "graph g(x: f32[4]) { p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[1] return %x }"
    with pytest.raises(CompilerBug, match="ends with p in flight"):
        _run(text, torch.randn(4))


@hypothesis.given(graphs(), hypothesis.strategies.integers(0, 2**16))
@hypothesis.settings(max_examples=60)
def test_random_programs_are_deterministic_and_read_no_poison(graph: Graph, seed: int) -> None:
    inputs = random_inputs(graph, 2, seed)
    found = run_reference([graph, graph], copy_inputs(inputs))
    assert_same(run_reference([graph, graph], inputs), found, rtol=0.0, atol=0.0)
    for rank in found:
        assert not any(bool(torch.isnan(x).any()) for x in rank if isinstance(x, torch.Tensor))
