from __future__ import annotations

from dcompile.collectives.fingerprint import communication_lines
from dcompile.collectives.text import parse_graph

PROGRAM = """
graph backward(x: f32[4], y: f32[2, 3]) {
  a: f32[4] = pointwise (i0: 4) exp(x[i0])
  b: f32[10] = pack (a, y)
  p: pending in place (r: f32[10]) = start all_reduce.sum (b) @g0[2]  # aten.add @train.py:7
  q: pending (s: f32[8]) = start all_gather (x) @g1[2]
  r: f32[10] = wait p
  s: f32[8] = wait q
  return %r, %s
}"""


def test_one_line_a_launch_with_the_parts_of_buckets() -> None:
    assert communication_lines(parse_graph(PROGRAM)) == (
        "all_reduce.sum @g0[2] (pack(a: f32[4], y: f32[2, 3]))  # train.py:7",
        "all_gather @g1[2] (f32[4])",
    )


def test_compute_may_differ_but_bucket_contents_may_not() -> None:
    lines = communication_lines(parse_graph(PROGRAM))
    assert communication_lines(parse_graph(PROGRAM.replace("exp(x[i0])", "tanh(x[i0])"))) == lines
    assert communication_lines(parse_graph(PROGRAM.replace("pack (a, y)", "pack (y, a)"))) != lines
    assert communication_lines(parse_graph(PROGRAM.replace("all_reduce.sum", "all_reduce.max"))) != lines
