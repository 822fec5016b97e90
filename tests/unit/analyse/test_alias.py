"""Views as strides, storages, footprints; strides are checked against what PyTorch itself makes of the same views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch

from dcompile.analyse.alias import Footprint, Strided, footprints, storage_roots, strided_views
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug


def one(text: str) -> dict[str, Strided | None]:
    return strided_views(parse_graph(text))


VIEWS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("v: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]", lambda x: x.t()),
    ("v: f32[2, 6] = view x (i0: 2, i1: 6) -> [i0 + 1, i1]", lambda x: x[1:3]),
    ("v: f32[2, 3]{12, 2} = view x (i0: 2, i1: 3) -> [2*i0 + 1, 2*i1]", lambda x: x[1::2, ::2]),
    ("v: f32[6] = view x (i0: 6) -> [2, i0]", lambda x: x[2]),
    ("v: f32[24] = view x (i0: 24) -> [i0 // 6, i0 % 6]", lambda x: x.view(24)),
    ("v: f32[8, 3] = view x (i0: 8, i1: 3) -> [(3*i0 + i1) // 6, (3*i0 + i1) % 6]", lambda x: x.view(8, 3)),
    ("v: f32[2, 4, 6]{0, 6, 1} = view x (i0: 2, i1: 4, i2: 6) -> [i1, i2]", lambda x: x.expand(2, 4, 6)),
    ("v: f32[4]{7} = view x (i0: 4) -> [i0, i0]", lambda x: x.diagonal()),
    (
        "v: f32[3, 4, 2]{2, 6, 1} = view x (i0: 3, i1: 4, i2: 2) -> [i1, 2*i0 + i2]",
        lambda x: x.view(4, 3, 2).transpose(0, 1),
    ),
]


@pytest.mark.parametrize(("line", "torch_view"), VIEWS)
def test_a_view_has_the_strides_pytorch_gives_it(line: str, torch_view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = one(f"graph g(x: f32[4, 6]) {{\n  {line}\n  return %v\n}}\n")["v"]
    wanted = torch_view(torch.randn(4, 6))
    assert found == Strided("x", tuple(wanted.shape), wanted.stride(), wanted.storage_offset())


def test_a_chain_ends_at_the_base() -> None:
    found = one(
        """graph g(x: f32[4, 6]) {
          t: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
          s: f32[3, 4]{1, 6} = view t (i0: 3, i1: 4) -> [i0 + 2, i1]
          r: f32[3]{1} = view s (i0: 3) -> [i0, 3]
          return %r
        }"""
    )
    wanted = torch.randn(4, 6).t()[2:5][:, 3]
    assert found["r"] == Strided("x", (3,), wanted.stride(), wanted.storage_offset())


def test_a_view_of_a_view_that_is_not_affine_may_be_affine_again() -> None:
    found = one(
        """graph g(x: f32[4, 6]) {
          t: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
          f: f32[24] = view t (i0: 24) -> [i0 // 4, i0 % 4]
          b: f32[6, 4] = view f (i0: 6, i1: 4) -> [4*i0 + i1]
          return %b
        }"""
    )
    assert found["f"] is None
    assert found["b"] == Strided("x", (6, 4), (1, 6), 0)


def test_a_flip_is_no_tensor() -> None:
    found = one("graph g(x: f32[5]) {\n  v: f32[5] = view x (i0: 5) -> [4 - i0]\n  return %v\n}\n")
    assert found == {"v": None}


def test_a_view_of_a_flip_back_to_front_is_one() -> None:
    found = one(
        """graph g(x: f32[5]) {
          v: f32[5] = view x (i0: 5) -> [4 - i0]
          w: f32[5] = view v (i0: 5) -> [4 - i0]
          return %w
        }"""
    )
    assert found["w"] == Strided("x", (5,), (1,), 0)


def test_symbolic_sizes() -> None:
    found = one(
        """graph g(x: f32[s0, 6], s0: size = 4) {
          v: f32[6, s0]{1, 6} = view x (i0: 6, i1: s0) -> [i1, i0]
          f: f32[6*s0] = view x (i0: 6*s0) -> [i0 // 6, i0 % 6]
          return %v
        }"""
    )
    assert found["v"] == Strided("x", (6, sympy.Symbol("s0", integer=True, nonnegative=True)), (1, 6), 0)
    flat = found["f"]
    assert flat is not None
    assert (flat.stride, flat.offset) == ((1,), 0)


def test_a_dimension_of_size_one_keeps_its_stated_stride_and_an_empty_view_is_strided() -> None:
    found = one(
        """graph g(x: f32[4, 6]) {
          v: f32[4, 1, 6]{6, 6, 1} = view x (i0: 4, i1: 1, i2: 6) -> [i0, i2]
          e: f32[0, 6] = view x (i0: 0, i1: 6) -> [3 - i0, i1]
          return %v, %e
        }"""
    )
    assert found["v"] == Strided("x", (4, 1, 6), (6, 6, 1), 0)
    assert found["e"] == Strided("x", (0, 6), (6, 1), 0)


SHARING = """graph g(x: f32[4, 6], w: f32[6, 6]) {
  v: f32[6, 4]{1, 6} = view x (i0: 6, i1: 4) -> [i1, i0]
  z: f32[4, 6] = pointwise (i0: 4, i1: 6) x[i0, i1] + 1.0:f32
  x2: f32[4, 6] = store set x (i0: 4, i1: 6) [i0, i1] = z[i0, i1]
  k: f32[4, 6], z2: f32[4, 6] = kernel targets (_, z) {
    nest (simd i0: 24) {
      write k[i0] = x2[i0]
      write z2[i0] = x2[i0]
    }
  }
  row: f32[6] = view z2 (i0: 6) -> [1, i0]
  p: pending in place (h: f32[6]) = start all_reduce.sum (row) @g0[2]
  h: f32[6] = wait p
  q: pending (u: f32[8, 6]) = start all_gather (k) @g0[2]
  u: f32[8, 6] = wait q
  a: f32[8, 6] = extern aten.alias.default(%u) aliases (u)
  return %h, %a
}
"""


def test_every_way_of_sharing_a_storage_is_followed() -> None:
    roots = storage_roots(parse_graph(SHARING))
    x, z, u = ("x", "v", "x2"), ("z", "z2", "row", "h"), ("u", "a")
    shared = {**dict.fromkeys(x, "x"), **dict.fromkeys(z, "z"), **dict.fromkeys(u, "u")}
    assert roots == {"w": "w", "k": "k", **shared}


def test_footprints_know_the_bytes_of_slices_and_their_versions() -> None:
    prints = footprints(parse_graph(SHARING))
    assert prints["v"] == Footprint("x", 0, 96)
    assert prints["row"] == prints["h"] == Footprint("z", 24, 48)
    assert prints["a"] == Footprint("u")
    assert prints["h"].overlaps(prints["z"])
    assert not prints["h"].overlaps(Footprint("z", 0, 24))
    assert Footprint("z").overlaps(prints["h"])
    assert not Footprint("z").overlaps(prints["u"])


def test_a_wait_without_a_launch_is_a_bug() -> None:
    graph = parse_graph(SHARING)
    broken = replace(graph, nodes=tuple(n for n in graph.nodes if "q" not in [d.name for d in n.defs]))
    with pytest.raises(CompilerBug, match="wait on q"):
        storage_roots(broken)
