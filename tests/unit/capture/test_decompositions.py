"""The tables of kept and broken-up ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dcompile
from dcompile.capture.decompositions import BROKEN_UP, KEPT, decompositions
from dcompile.capture.pieces import channels_last_unpooling, flat_indexing, random_pieces, view_copies
from dcompile.lower.table import RULES

aten = torch.ops.aten


def test_tables_do_not_contradict_each_other_and_give_reasons() -> None:
    assert not KEPT.keys() & BROKEN_UP.keys()
    assert all(reason.strip() for reason in (KEPT | BROKEN_UP).values())


def test_kept_ops_have_no_decomposition_and_broken_up_ones_have() -> None:
    table = decompositions()
    for name in KEPT:
        assert getattr(aten, name).default not in table
    for name in BROKEN_UP:
        packet = getattr(aten, name, None)
        if packet is not None:
            assert any(getattr(packet, overload) in table for overload in packet.overloads()), name


def test_an_op_is_kept_for_a_rule_or_for_the_library() -> None:
    for name, reason in KEPT.items():
        has_rule = f"aten.{name}.default" in RULES
        assert "library" in reason or has_rule, f"{name} has no lowering rule"
        assert not ("rule" in reason and "no lowering rule" not in reason) or has_rule, name


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: F.unfold(x, 3, padding=1, stride=2), (2, 3, 8, 7)),
        (lambda x: F.fold(x, (6, 5), 2), (2, 12, 20)),
    ],
)
def test_windows_that_overlap_are_gathers_and_scatters(
    function: Any, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    dcompile.reset_counters()
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    found, expected = torch.compile(function, backend="dcompile")(x), function(twin)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, twin.grad)
    assert not dcompile.counters().fallbacks


def test_pieces_compute_the_same() -> None:
    table = decompositions()
    x = torch.randn(4, 6)
    torch.testing.assert_close(table[aten._softmax.default](x, 1, False), torch.softmax(x, 1))
    torch.testing.assert_close(table[aten.gelu.default](x), torch.nn.functional.gelu(x))
    ours = table[aten.native_layer_norm.default](x, [6], torch.arange(6.0), None, 1e-5)
    torch.testing.assert_close(ours, aten.native_layer_norm(x, [6], torch.arange(6.0), None, 1e-5))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_flat_positions(shape: tuple[int, ...]) -> None:
    x, places = torch.randn(3, 4), torch.randint(-12, 12, shape)
    pieces = flat_indexing()
    assert torch.equal(pieces[aten.take.default](x, places), x.take(places))
    source = torch.randn(shape)
    for accumulate in (True,) if shape else (True, False):  # repeated places may be written in any order
        found = pieces[aten.put.default](x, places, source, accumulate)
        torch.testing.assert_close(found, x.put(places, source, accumulate))


def test_copies_of_views_are_contiguous() -> None:
    pieces = view_copies()
    x = torch.randn(2, 3, 4)
    for op, args in (
        (aten.permute_copy.default, ([2, 0, 1],)),
        (aten.transpose_copy.int, (0, 2)),
        (aten.t_copy.default, ()),
    ):
        source = x[0] if op is aten.t_copy.default else x
        found, expected = pieces[op](source, *args), op(source, *args)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert all(part.is_contiguous() for part in pieces[aten.split_copy.Tensor](x.mT, 2, 1))


def test_unpooling_keeps_the_layout_of_its_operand() -> None:
    unpool = channels_last_unpooling()[aten.max_unpool2d.default]
    x, places = torch.nn.functional.max_pool2d(torch.randn(2, 3, 6, 8), 2, return_indices=True)
    assert unpool(x, places, [6, 8]) is NotImplemented
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, places)]
    found, expected = unpool(*last, [6, 8]), aten.max_unpool2d.default(*last, [6, 8])
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride() != expected.contiguous().stride()


def test_random_pieces_stay_in_their_ranges_and_follow_the_seed() -> None:
    pieces = random_pieces()

    def drawn(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(3)
        first = pieces[op](*args, **kwargs)
        torch.manual_seed(3)
        assert torch.equal(first, pieces[op](*args, **kwargs))
        return first

    x = torch.empty(20000)
    whole = drawn(aten.randint.low, -3, 4, [20000])
    assert sorted(set(whole.tolist())) == list(range(-3, 4))
    assert whole.dtype is torch.int64
    assert abs(float(drawn(aten.uniform.default, x, 2.0, 6.0).mean()) - 4.0) < 0.05
    assert abs(float(drawn(aten.normal_functional.default, x, 1.0, 2.0).std()) - 2.0) < 0.05
    geometric = drawn(aten.geometric.default, x, 0.25)
    assert float(geometric.min()) == 1.0
    assert abs(float(geometric.mean()) - 4.0) < 0.15
    assert pieces[aten.randint.low](0, 2**40, [2]) is NotImplemented
