"""First and last use of each storage."""

from __future__ import annotations

from dcompile.analyse.lifetime import BEFORE, Lifetime, lifetimes
from dcompile.collectives.text import parse_graph


def test_views_versions_flights_inputs_and_outputs() -> None:
    graph = parse_graph(
        """graph g(x: f32[4], unused: f32[4]) {
          a: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
          v: f32[2] = view a (i0: 2) -> [i0]
          p: pending (r: f32[8]) = start all_gather (a) @g0[2]
          b: f32[4] = pointwise (i0: 4) x[i0] * 2.0:f32
          r: f32[8] = wait p
          c: f32[2] = pointwise (i0: 2) v[i0] + r[i0]
          b2: f32[4] = store add b (i0: 2) [i0] = c[i0]
          return %b2
        }"""
    )
    assert lifetimes(graph) == {
        "x": Lifetime(BEFORE, 3),
        "unused": Lifetime(BEFORE, BEFORE),
        "a": Lifetime(0, 5),
        "r": Lifetime(2, 5),
        "b": Lifetime(3, 7),
        "c": Lifetime(5, 6),
    }


def test_from_launch_to_wait_every_buffer_of_a_collective_is_in_use() -> None:
    graph = parse_graph(
        """graph g(x: f32[4], y: f32[4]) {
          a: f32[4] = pointwise (i0: 4) x[i0] + 1.0:f32
          b: f32[4] = pointwise (i0: 4) y[i0] + 1.0:f32
          p: pending (r: f32[8], s: f32[8]) = start all_gather (a, b) @g0[2]
          q: pending in place (t: f32[4]) = start all_reduce.sum (x) @g0[2]
          t: f32[4] = wait q
          r: f32[8], s: f32[8] = wait p
          return %t
        }"""
    )
    found = lifetimes(graph)
    assert found["a"] == Lifetime(0, 5)
    assert found["b"] == Lifetime(1, 5)
    assert found["r"] == found["s"] == Lifetime(2, 5)
    assert found["x"] == Lifetime(BEFORE, 6)
