"""The tables of kept and broken-up ops."""

from __future__ import annotations

import torch

from dcompile.capture.decompositions import BROKEN_UP, KEPT, decompositions

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


def test_pieces_compute_the_same() -> None:
    table = decompositions()
    x = torch.randn(4, 6)
    torch.testing.assert_close(table[aten._softmax.default](x, 1, False), torch.softmax(x, 1))
    torch.testing.assert_close(table[aten.gelu.default](x), torch.nn.functional.gelu(x))
    ours = table[aten.native_layer_norm.default](x, [6], torch.arange(6.0), None, 1e-5)
    torch.testing.assert_close(ours, aten.native_layer_norm(x, [6], torch.arange(6.0), None, 1e-5))
