from __future__ import annotations

import re

import pytest

from dcompile.ir.canonical import Canonical, canonical
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Kernel
from dcompile.ir.text import parse_graph, print_node

TEXT = """
graph g(s0: size = 8, s1: size = 3, x: f32[4, s0], y: f32[4], other: f32[4, s1]) {
  total: f32[4], y1: f32[4] = kernel targets (_, y) inplace (total: x) {  # aten.sum @a.py:1
    scratch row: f32[16]
    nest (parallel i0: 4) {
      fold (serial r0: s0) {
        let e = exp(x[r0 + s0*i0])
        a = sum e
        write row[r0] = e
      }
      nest (simd i1: 4) {
        let e = row[i1] * a
        write add y1[q0 | q0 = index(i1)] = e
      }
      write total[i0] = a
    }
  }
  return %total, %y1
}
"""


def _canonical(text: str) -> Canonical:
    graph = parse_graph(text)
    (kernel,) = graph.nodes
    assert isinstance(kernel, Kernel)
    return canonical(kernel, {name: graph.value(name) for name in kernel.operands})


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\b[a-z]\w*", lambda word: names.get(word[0], word[0]), text)


def test_places_are_filled_in_parameter_order() -> None:
    found = _canonical(TEXT)
    assert found.buffers == ("y", "x", "total", "y1")
    assert found.symbols == (symbol("s0"),)
    assert found.kernel.operands == ("b0", "b1")
    assert [out.name for out in found.kernel.outs] == ["b2", "b3"]
    assert found.kernel.targets == (None, "b0")
    assert found.kernel.inplace == (("b2", "b1"),)


def test_definitions_are_named_by_position() -> None:
    assert (
        print_node(_canonical(TEXT).kernel)
        == """\
b2: f32[4], b3: f32[4] = kernel targets (_, b0) inplace (b2: b1) {
  scratch m0: f32[16]
  nest (parallel v0: 4) {
    fold (serial v1: n0) {
      let e0 = exp(b1[n0*v0 + v1])
      e1 = sum e0
      write m0[v1] = e0
    }
    nest (simd v2: 4) {
      let e2 = m0[v2] * e1
      write add b3[q0 | q0 = index(v2)] = e2
    }
    write b2[v0] = e1
  }
}"""
    )


@pytest.mark.parametrize(
    "names",
    [
        {"total": "zz", "y1": "aa", "x": "w9", "y": "v"},
        {"i0": "j5", "i1": "j0", "r0": "i0"},
        {"e": "value", "row": "tmp", "a": "e"},
        {"s0": "u7"},
        {"aten": "prims"},
    ],
)
def test_names_and_origins_do_not_count(names: dict[str, str]) -> None:
    text = _renamed(TEXT, names)
    assert text != TEXT
    assert _canonical(text).key == _canonical(TEXT).key
    assert _canonical(text).kernel == _canonical(TEXT).kernel


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp(", "tanh("),
        ("parallel", "serial"),
        ("write add", "write"),
        ("x: f32[4, s0]", "x: f32[4, s0]@cuda"),
        ("x: f32[4, s0]", "x: f32[4, s1]"),
        ("y: f32[4],", "y: f32[4]{2},"),
        ("row: f32[16]", "row: f32[32]"),
        ("inplace (total: x) ", ""),
        ("a = sum e", "a = max e"),
        ("r0: s0", "r0: 7"),
    ],
)
def test_structure_counts(old: str, new: str) -> None:
    assert _canonical(TEXT.replace(old, new)).key != _canonical(TEXT).key


def test_canonical_of_a_canonical_kernel_is_itself() -> None:
    first = _canonical(TEXT)
    graph = parse_graph(TEXT)
    layouts = dict(zip((f"b{n}" for n in range(4)), (graph.value(name) for name in first.buffers), strict=True))
    renamed = {n: type(v)(n, v.dtype, _first(v.shape), _first(v.stride), v.device) for n, v in layouts.items()}
    again = canonical(first.kernel, renamed)
    assert again.kernel == first.kernel
    assert again.key == first.key


def _first(sizes: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(symbol("n0") if size == symbol("s0") else size for size in sizes)
