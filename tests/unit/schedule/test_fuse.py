from __future__ import annotations

import pytest

from dcompile.collectives.text import parse_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Fold, Kernel, Nest, Role
from dcompile.schedule.fuse import fuse
from tests.unit.schedule.passes import apply, assert_same_numbers, context, same


def kernels(graph: Graph) -> list[Kernel]:
    return [node for node in graph.nodes if isinstance(node, Kernel)]


def fused(text: str) -> Graph:
    """``text`` after fusion, checked against the reference interpreter."""
    before = parse_graph(text).check()
    after = fuse(before, context()).check()
    assert_same_numbers(before, after)
    return after


def test_softmax_becomes_one_kernel_with_the_exponentials_kept_in_scratch() -> None:
    before = """
    graph f(x: f32[4, 6]) {
      m: f32[4] = reduce max (i0: 4; r0: 6) x[i0, r0]
      e: f32[4, 6] = pointwise (i0: 4, i1: 6) exp(x[i0, i1] - m[i0])
      s: f32[4] = reduce sum (i0: 4; r0: 6) e[i0, r0]
      o: f32[4, 6] = pointwise (i0: 4, i1: 6) e[i0, i1] / s[i0]
      return %o
    }"""
    after = """
    graph f(x: f32[4, 6]) {
      o: f32[4, 6] = kernel targets (_) inplace (o: x) {
        nest (serial p0: 4) {
          scratch e_row: f32[6]
          fold (simd r0: 6) m_acc = max x[6*p0 + r0]
          let m = m_acc
          fold (simd r0: 6) {
            let e = exp(x[6*p0 + r0] - m)
            s_acc = sum e
            write e_row[r0] = e
          }
          let s = s_acc
          nest (simd r0: 6) {
            let o = e_row[r0] / s
            write o[6*p0 + r0] = o
          }
        }
      }
      return %o
    }"""
    assert apply(fuse, before) == same(after)
    assert_same_numbers(parse_graph(before), parse_graph(after))


def test_column_sums_share_one_pass_and_their_epilogue() -> None:
    graph = fused(
        """
    graph f(g: f32[16, 12], h: f32[16, 12]) {
      a: f32[12] = reduce sum (i0: 12; r0: 16) g[r0, i0]
      b: f32[12] = reduce sum (i0: 12; r0: 16) g[r0, i0] * h[r0, i0]
      c: f32[12] = pointwise (i0: 12) a[i0] * b[i0]
      return %c, %a
    }"""
    )
    assert len(kernels(graph)) == 1
    assert [out.name for out in kernels(graph)[0].outs] == ["a", "c"]


def test_siblings_over_reshaped_views_of_one_buffer_fuse() -> None:
    graph = fused(
        """
    graph f(x: f32[6, 4]) {
      m: f32[2, 3] = reduce sum (i0: 2, i1: 3; r0: 4) x[3*i0 + i1, r0]
      y: f32[2, 3, 4] = pointwise (i0: 2, i1: 3, i2: 4) x[3*i0 + i1, i2] - m[i0, i1]
      z: f32[24] = pointwise (i0: 24) exp(x[i0 // 4, i0 % 4])
      return %y, %z
    }"""
    )
    assert len(kernels(graph)) == 1


def test_a_path_through_a_library_call_keeps_kernels_apart() -> None:
    graph = fused(
        """
    graph f(x: f32[8, 8]) {
      a: f32[8, 8] = pointwise (i0: 8, i1: 8) exp(x[i0, i1])
      m: f32[8, 8] = extern aten.mm.default(%a, %a) -> aten.mm.out
      b: f32[8, 8] = pointwise (i0: 8, i1: 8) a[i0, i1] + m[i0, i1]
      return %b
    }"""
    )
    assert [type(n).__name__ for n in graph.nodes] == ["Kernel", "Extern", "Kernel"]


def test_reading_a_neighbour_row_keeps_kernels_apart() -> None:
    graph = fused(
        """
    graph f(x: f32[8, 6]) {
      s: f32[8] = reduce sum (i0: 8; r0: 6) x[i0, r0]
      y: f32[8, 6] = pointwise (i0: 8, i1: 6) x[i0, i1] - s[-i0 + 7]
      return %y
    }"""
    )
    assert len(kernels(graph)) == 2


def test_unrelated_loops_stay_apart() -> None:
    graph = fused(
        """
    graph f(x: f32[8], y: f32[8]) {
      a: f32[8] = pointwise (i0: 8) exp(x[i0])
      b: f32[8] = pointwise (i0: 8) exp(y[i0])
      return %a, %b
    }"""
    )
    assert len(kernels(graph)) == 2


def test_an_elementwise_update_fuses_with_what_computes_it() -> None:
    graph = fused(
        """
    graph f(p: f32[8], g: f32[8], m: f32[8]) {
      n: f32[8] = pointwise (i0: 8) 0.9:f32 * m[i0] + g[i0]
      m1: f32[8] = store set m (i0: 8) [i0] = n[i0]
      p1: f32[8] = store set p (i0: 8) [i0] = p[i0] - 0.1:f32 * n[i0]
      return
    }"""
    )
    assert len(kernels(graph)) == 1
    assert kernels(graph)[0].mutates == ("m", "p")


def test_a_shifted_read_of_a_written_buffer_does_not_fuse_with_the_write() -> None:
    graph = fused(
        """
    graph f(p: f32[8], g: f32[8]) {
      a: f32[8] = pointwise (i0: 8) p[-i0 + 7] + g[i0]
      p1: f32[8] = store set p (i0: 8) [i0] = g[i0]
      return %a
    }"""
    )
    assert len(kernels(graph)) == 2


def test_repeated_positions_accumulate_in_order() -> None:
    graph = fused(
        """
    graph f(idx: i64[40], g: f32[40, 4], w: f32[3, 4]) {
      w1: f32[3, 4] = store add w (i0: 40, i1: 4) [q0, i1 | q0 = wrap_index(idx[i0], 3:i64)] = g[i0, i1]
      return
    }"""
    )
    (kernel,) = kernels(graph)
    (nest,) = kernel.body
    assert isinstance(nest, Nest)
    assert nest.roles == (Role.SERIAL, Role.SIMD)


def test_a_view_no_strides_express_is_copied_for_the_library() -> None:
    graph = fused(
        """
    graph f(x: f32[4, 6], w: f32[3, 2]) {
      v: f32[8, 3] = view x (i0: 8, i1: 3) -> [(3*i0 + i1) % 4, (3*i0 + i1) // 4]
      m: f32[8, 2] = extern aten.mm.default(%v, %w) -> aten.mm.out
      return %m
    }"""
    )
    assert [type(n).__name__ for n in graph.nodes] == ["Kernel", "Extern"]


def test_a_full_reduction_with_its_epilogue_is_one_kernel() -> None:
    graph = fused(
        """
    graph f(x: f32[10, 10]) {
      s: f32[] = reduce sum (; r0: 10, r1: 10) x[r0, r1] * x[r0, r1]
      n: f32[] = pointwise () sqrt(s[])
      y: f32[10, 10] = pointwise (i0: 10, i1: 10) x[i0, i1] / n[]
      return %y
    }"""
    )
    assert len(kernels(graph)) == 1


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_narrow_results_keep_their_rounding_inside_a_kernel(dtype: str) -> None:
    graph = fused(
        f"""
    graph f(x: {dtype}[6, 8]) {{
      y: {dtype}[6, 8] = pointwise (i0: 6, i1: 8) to_{dtype}(exp(to_f32(x[i0, i1])))
      s: {dtype}[6] = reduce sum (i0: 6; r0: 8) to_f32(y[i0, r0])
      z: {dtype}[6, 8] = pointwise (i0: 6, i1: 8) to_{dtype}(to_f32(y[i0, i1]) / to_f32(s[i0]))
      return %z, %y
    }}"""
    )
    assert len(kernels(graph)) == 1


def test_threads_share_a_long_reduction_to_one_value() -> None:
    graph = fused(
        """
    graph f(x: f32[128, 1024]) {
      s: f32[] = reduce sum (; r0: 128, r1: 1024) x[r0, r1] * x[r0, r1]
      return %s
    }"""
    )
    (kernel,) = kernels(graph)
    fold = kernel.body[0]
    assert isinstance(fold, Fold)
    assert fold.roles == (Role.PARALLEL, Role.SIMD)
    assert [size for _, size in fold.axes] == [32, 4096]


SCATTER = """
graph f(w: f32[{width}], g: f32[600, 64], idx: i64[600, 64]) {{
  w1: f32[{width}] = store add w (i0: 600, i1: 64) [{step}*i0 + q0 | q0 = wrap_index(idx[i0, i1], 64:i64)] = g[i0, i1]
  return %w1
}}"""


@pytest.mark.parametrize(("step", "first"), [(64, Role.PARALLEL), (63, Role.SERIAL)])
def test_scatters_use_threads_where_rows_never_share_an_address(step: int, first: Role) -> None:
    (kernel,) = kernels(fused(SCATTER.format(step=step, width=600 * 64)))
    (nest,) = kernel.body
    assert isinstance(nest, Nest)
    assert [size for _, size in nest.axes] == [600, 64]
    assert nest.roles == (first, Role.SERIAL)
