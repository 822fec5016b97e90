"""Contents by last writer: stretches, keys of steps, and what results of calls show."""

from __future__ import annotations

from dcompile.analyse.contents import RETURN, Contents, last_writers, step_keys, what_reads_find
from dcompile.analyse.places import Bytes, unplanned
from dcompile.collectives.text import parse_graph

SPACE = ("storage", "x")


def at(start: int, stop: int) -> Bytes:
    return Bytes(SPACE, start, stop, "x")


def test_stretches_count_from_the_reader_and_join() -> None:
    contents = Contents()
    assert contents.read(at(4, 12)) == ((0, 8, None),)
    assert contents.read(at(4, 4)) == ()
    for start, stop, writer in ((0, 16, "a"), (4, 8, "b"), (8, 12, "b"), (14, 16, "c")):
        contents.write(at(start, stop), writer)
    assert contents.read(at(2, 20)) == ((0, 2, "a"), (2, 10, "b"), (10, 12, "a"), (12, 14, "c"), (14, 18, None))
    assert contents.read(at(6, 10)) == ((0, 4, "b"),)


PROGRAM = parse_graph("""graph g(x: f32[8], y: f32[4]) {
  v: f32[4] = view x (i0: 4) -> [i0 + 2]
  a: f32[4] = extern lib.scale_.default(%v) writes (v) versions (v2: f32[4]) aliases (v)
  extern lib.flush.default(1) effect
  b: f32[4] = extern lib.same.default(%y) aliases (y)
  p: pending in place (r: f32[4]) = start all_reduce.sum (v2) @g0[2]
  r: f32[4] = wait p
  extern lib.flush.default(1) effect
  c: f32[8] = extern aten.relu.default(%x)
  return %c, %b
}""")


def test_what_reads_find_follows_writes_through_views_and_launches() -> None:
    found = what_reads_find(PROGRAM, unplanned(PROGRAM, {}))
    assert found["a", "v"] == ((0, 16, "x"),)
    assert found["p", "v2"] == ((0, 16, "v2"),)
    assert found["c", "x"] == ((0, 8, "x"), (8, 24, "r"), (24, 32, "x"))
    assert found[RETURN, "b"] == ((0, 16, "y"),)


def test_results_that_are_operands_show_their_newest_writer() -> None:
    writer = last_writers(PROGRAM)
    assert {name: writer[name] for name in ("v", "a", "b", "r")} == {"v": "x", "a": "v2", "b": "y", "r": "r"}


def test_calls_that_define_nothing_are_told_apart_by_their_number() -> None:
    keys = step_keys(PROGRAM)
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if isinstance(key, str)] == ["v", "a", "b", "p", "r", "c"]
