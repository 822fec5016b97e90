from __future__ import annotations

import math

import hypothesis
import pytest
import sympy

from dcompile.errors import ParseError
from dcompile.ir import expr as ex
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import FloorDiv, Mod, symbol
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Literal, Pointwise, Ref, Store
from dcompile.ir.text import (
    parse_expr,
    parse_graph,
    parse_index,
    print_expr,
    print_graph,
    print_index,
    print_node,
)
from dcompile.ir.text_expr import DEEPEST_NESTING
from dcompile.ir.types import DType, Value
from tests.strategies import contiguous, graphs

I0, I1, S0, S1 = (symbol(n) for n in ("i0", "i1", "s0", "s1"))
F32, I64 = DType.F32, DType.I64

LOOPS = """\
graph forward(x: f32[4, 8], s0: size = 12, w: f32[8, 16]{1, 8}, idx: i64[4], table: bf16[10, s0 + 1]@cuda) {
  t0: f32[4, 16] = extern aten.mm.default(%x, %w) -> aten.mm.out  # aten.mm.default @train.py:41
  t1: f32[4, 16] = pointwise (i0: 4, i1: 16) maximum(t0[i0, i1], 0.0:f32)  # aten.relu.default
  t2: f32[4] = reduce sum (i0: 4; r0: 16) let c0 = exp(t1[i0, r0]) in c0 * c0 - (t0[i0, r0] - -inf:f32)
  t3: f32[4, 2] = pointwise (i0: 4, i1: 2) to_f32(table[q0, i1 | q0 = wrap_index(idx[i0], 10:i64)])
  t4: f32[64] = view t1 (i0: 64) -> [i0 // 16, i0 % 16]
  t5: f32[4, 16] = store add t1 (i0: 4) let c0 = idx[i0] % 4:i64 in [q0, 3 | q0 = c0] = t2[i0] * to_f32(c0 * c0)
  t6: f32[20] = pack (t2, t5)
  _, t7: i64[4] = extern aten.sort.default(%t2, 0, false)
  extern lib.log.default(%t7, "a \\"b\\"\\n", <dtype "f32">, [1, -2.5, none, s0 + 1], alpha = inf) effect fallback seq
  t8: f32[4, 8], t9: f32[8, 4]{1, 8} = extern lib.f.g(%x) writes (x) versions (x1: f32[4, 8]) aliases (_, x) barrier
  t10: f32[4], t11: f32[4], t12: f32[4] = reduce welford (i0: 4; r0: 8) t8[i0, r0]
  t13: f32[], t14: f32[], t15: f32[] = reduce welford_merge (; r0: 4) (t10[r0], t11[r0], t12[r0])
  t16: i32[4] = reduce xor (i0: 4; r0: 8) to_i32(t8[i0, r0])
  t17: f32[4, 8] = scan (i0: 4, i1: 8) along i1 (to_f64(t8[i0, i1])) by (left0 + right0) from (0.0:f64)
  t18: f32[4], t19: i64[4] = scan (i0: 4) along i0 (t2[i0], index(i0)) by (left0 - right0, left1) from (0.0:f32, 0:i64)
  t20: f32[4, 8] = scan (i0: 4, i1: 8) along i1 (t8[i0, i1]) by (left0 + right0 * 2.0:f32)
  return %t6, s0 + 2, 1.5, true, none, 3, %t6
}
"""

KERNELS = """\
graph inference(x: f32[4, 16], y: f32[4, 16]) {
  s: f32[4], y1: f32[4, 16] = kernel targets (_, y) inplace (s: x) {  # aten.exp.default aten.sum.dim_IntList @a b.py:3
    scratch buffer: f32[16]
    nest (parallel i0: 4) {
      fold (serial r0: 16) top = max x[16*i0 + r0]
      fold (simd r0: 16) {
        let e = exp(x[16*i0 + r0] - top)
        total = sum e
        best = argmax e
        write buffer[r0] = e
      }
      let inverse = let c0 = total + top in c0 * c0
      nest (simd i1: 16) {
        write add y1[16*i0 + q0 | q0 = best] = buffer[i1] / inverse
      }
      write s[i0] = total
      fold (simd r0: 16) {
        mean, squares, n = welford x[16*i0 + r0]
        a, b, c = welford_merge (x[16*i0 + r0], top, 1.0:f32)
      }
      scan (r0: 16) {
        let e = exp(x[16*i0 + r0])
        a, b = running (e, index(r0)) by (left0 + right0, maximum(left1, right1))
        write y1[16*i0 + r0] = a + mean / n
      }
      scan (r0: 16) in 4 through s {
        c = running (x[16*i0 + r0]) by (left0 * right0) from (1.0:f32)
        write y1[16*i0 + r0] = c
      }
    }
  }
  return %y1, %s
}
"""


@pytest.mark.parametrize("text", [LOOPS, KERNELS], ids=["loops", "kernels"])
def test_text_is_what_is_printed(text: str) -> None:
    graph = parse_graph(text)
    assert print_graph(graph) == text
    assert parse_graph(print_graph(graph)) == graph


def test_parsed_nodes_hold_what_the_text_says() -> None:
    graph = parse_graph(LOOPS)
    mm, relu = graph.nodes[:2]
    assert isinstance(mm, Extern)
    assert (mm.args, mm.out_op) == ((Ref("x"), Ref("w")), "aten.mm.out")
    assert (mm.origin.ops, mm.origin.source) == (("aten.mm.default",), "train.py:41")
    assert isinstance(relu, Pointwise)
    assert relu.expr is ex.op("maximum", ex.load("t0", (I0, I1), F32), ex.const(0.0, F32))
    assert relu.axes == ((I0, 4), (I1, 16))
    assert graph.inputs[1] == SizeInput(S0, 12)
    assert graph.inputs[4] == Value("table", DType.BF16, (10, S0 + 1), (S0 + 1, 1), "cuda")
    assert graph.value("w").stride == (1, 8)
    store, log, alias = graph.nodes[5], graph.nodes[8], graph.nodes[9]
    assert isinstance(store, Store)
    assert store.mode == "add"
    assert store.index == (ex.bound(0), sympy.Integer(3))
    assert isinstance(log, Extern)
    assert log.args == (Ref("t7"), 'a "b"\n', Literal("dtype", "f32"), (1, -2.5, None, S0 + 1))
    assert log.kwargs == (("alpha", math.inf),)
    assert (log.effect, log.fallback, log.seq, log.barrier) == (True, True, True, False)
    assert isinstance(alias, Extern)
    assert (alias.writes, alias.aliases, alias.versions) == (("x",), (None, "x"), (contiguous("x1", (4, 8)),))
    assert graph.outputs == (Ref("t6"), S0 + 2, 1.5, True, None, 3, Ref("t6"))


def test_origin_of_a_kernel_is_that_of_its_first_line() -> None:
    (kernel,) = parse_graph(KERNELS).nodes
    assert isinstance(kernel, Kernel)
    assert kernel.origin.ops == ("aten.exp.default", "aten.sum.dim_IntList")
    assert kernel.origin.source == "a b.py:3"
    assert kernel.targets == (None, "y")
    assert kernel.inplace == (("s", "x"),)


@hypothesis.given(graphs(collectives=False, symbolic=True))
@hypothesis.settings(max_examples=60)
def test_round_trip_of_random_graphs(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert [node.origin for node in again.nodes] == [node.origin for node in graph.nodes]
    assert print_graph(again) == text


@pytest.mark.parametrize(
    "expr",
    [
        I0 * 16 + I1,
        FloorDiv(I0 * 3 + S0, 4) * 5 - Mod(I1 - 2, S0) * 2,
        FloorDiv(Mod(I0, 8), 2),
        Mod(FloorDiv(I0, 8), sympy.Integer(2)),
        FloorDiv(I0, FloorDiv(S0, 2)),
        Mod(I0, Mod(S0, 5)),
        -I0,
        -2 * I0 * S0,
        S0 * (S0 + 1) * I0,
        sympy.Rational(1, 2) * S0,
        sympy.Rational(-3, 2) * S0 * S1 + 1,
        S0**2 * I0 - S0**-1,
        sympy.Max(S0, S1 + 1) - sympy.Min(2, S0),
        sympy.Integer(-7),
    ],
    ids=str,
)
def test_index_expressions_come_back_equal(expr: sympy.Expr) -> None:
    assert parse_index(print_index(expr)) == expr


def test_division_and_remainder_follow_python_precedence() -> None:
    assert parse_index("i0 + 7 // 2 % 2 * 3 - i1 % 4") == I0 + 3 - Mod(I1, sympy.Integer(4))
    assert parse_index("-i0 // 2") == FloorDiv(-I0, 2)


def test_a_function_without_text_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="sin"):
        print_index(sympy.sin(I0))


def _round_trip(expr: ex.Expr) -> ex.Expr:
    return parse_expr(print_expr(expr), {"x": F32, "idx": I64, "flag": DType.BOOL}, {"acc": F32, "c0": F32})


X = ex.load("x", (I0,), F32)
Y = ex.load("x", (I1,), F32)
IDX = ex.load("idx", (I0,), I64)


@pytest.mark.parametrize(
    "expr",
    [
        ex.const(math.inf, F32),
        ex.const(-math.inf, DType.BF16),
        ex.const(math.nan, F32),
        ex.const(-0.0, DType.F64),
        ex.const(1e-30, F32),
        ex.const(1e300, DType.F64),
        ex.const(0.1, F32),
        ex.const(-5, I64),
        ex.const(2.0, DType.C64),
        ex.const(True, DType.BOOL),
        ex.op("sub", ex.op("sub", X, Y), ex.op("sub", X, Y)),
        ex.op("div", X, ex.op("mul", X, ex.op("add", X, Y))),
        ex.op("eq", ex.op("lt", X, Y), ex.op("gt", Y, X)),
        ex.op("not", ex.op("and", ex.op("isnan", X), ex.load("flag", (), DType.BOOL))),
        ex.op("where", ex.op("ge", X, Y), X, ex.op("neg", Y)),
        ex.op("bitcast", X, dtype=DType.I32),
        ex.op("randn", IDX, ex.index(I0 * 4), dtype=F32),
        ex.op("floordiv", ex.op("mod", IDX, IDX), ex.index(S0)),
        ex.masked(ex.op("lt", ex.index(I0 - 1), ex.const(3, I64)), X, ex.const(0.0, F32)),
        ex.to(ex.index(I0 + S0, DType.I32), F32),
        ex.index(ex.bound(0) + I0, I64, (ex.op("mul", IDX, IDX),)),
        ex.load("x", (ex.bound(0) + ex.bound(1),), F32, (IDX, ex.load("idx", (ex.bound(0),), I64, (IDX,)))),
        ex.op("add", ex.local("acc", F32), ex.op("mul", ex.local("c0", F32), X)),
    ],
    ids=print_expr,
)
def test_scalar_expressions_come_back_the_same_object(expr: ex.Expr) -> None:
    assert _round_trip(expr) is expr


def test_shared_sub_expressions_are_printed_once() -> None:
    expr: ex.Expr = X
    for _ in range(60):  # as a tree this has 2**60 leaves
        expr = ex.op("add", ex.op("tanh", expr), ex.op("neg", expr))
    text = print_expr(expr)
    assert text.count("tanh") == 60
    assert _round_trip(expr) is expr


def test_names_of_shared_sub_expressions_avoid_locals() -> None:
    square = ex.op("add", ex.local("c0", F32), X)
    expr = ex.op("mul", square, square)
    assert print_expr(expr) == "let c1 = c0 + x[i0] in c1 * c1"
    assert _round_trip(expr) is expr


def test_a_long_chain_is_cut_into_pieces() -> None:
    expr: ex.Expr = X
    for _ in range(3000):
        expr = ex.op("sin", expr)
    text = print_expr(expr)
    assert max(part.count("sin(") for part in text.split(", ")) <= DEEPEST_NESTING
    assert _round_trip(expr) is expr


def test_names_that_look_like_something_else_are_quoted() -> None:
    value = contiguous("return", (2,))
    out = contiguous("t.1 b", (2,))
    node = Pointwise(out=out, axes=((I0, 2),), expr=ex.load("return", (I0,), F32))
    graph = Graph("a graph", (value,), (node,), (Ref("t.1 b"),))
    assert print_node(node) == "`t.1 b`: f32[2] = pointwise (i0: 2) `return`[i0]"
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("graph g(x: f32[4]) {\n  y: f32[4] = pointwise (i0: 4) z[i0]\n", "line 2, column 33: expected the name"),
        ("graph g(x: f32[4]) {\n  y: f32[4] = pointwise (i0 4) x[i0]\n", "line 2, column 29: expected ':', found '4'"),
        ("graph g(x: f33[4]) {", r"line 1, column 12: expected a dtype \(f64, .*found 'f33'"),
        ("graph g(x: f32[4]) {\n  y: f32[4] = frobnicate x\n", "line 2, column 15: expected a node"),
        ("graph g(x: f32[4], n: i64[4]) { y: f32[4] = pointwise (i0: 4) x[i0] + n[i0]", "column 69: expected operand"),
        ("graph g(x: f32[4]) { y: f32[4] = pointwise (i0: 4) exp(x[i0], x[i0])", "column 52: expected a scalar"),
        ("graph g(x: f32[4]) { y: f32[4] = pointwise (i0: 4) x[i0] ? 1", "column 58: expected a token, found '\\?'"),
        ("graph g(x: f32[4]) { return %x", "column 31: expected '}', found the end of the text"),
        ("graph g(x: f32[4]{1, 2}) { return %x }", "column 18: expected 1 strides"),
        ("graph g(x: f32[4]) { return %x } y", "column 34: expected the end of the text, found 'y'"),
        ("graph g() { k: f32[] = kernel { write k[0, 1] = 1.0:f32 } return %k }", "column 40: expected one flat"),
        ("graph g() { k: f32[] = kernel { nest (fast i0: 4) { } } return %k }", "column 39: expected a role"),
        ("graph g() { k: f32[] = kernel { nest (simd i0: 4) { let a = 1.0:f32 } write k[0] = a } }", "column 84:"),
    ],
)  # fmt: skip
def test_errors_name_line_column_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_graph(text)
