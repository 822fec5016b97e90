"""The alpha-beta model: its formula, and the measured times its default numbers came from."""

from __future__ import annotations

import pytest

from dcompile.collectives.cost import LinkModel, ring_steps, wire_bytes
from dcompile.collectives.nodes import Kind


def test_wire_bytes_of_the_bandwidth_optimal_algorithms() -> None:
    assert wire_bytes(Kind.ALL_REDUCE, 1000, 4) == 1500
    assert wire_bytes(Kind.ALL_GATHER, 1000, 4) == wire_bytes(Kind.REDUCE_SCATTER, 1000, 4) == 750
    assert wire_bytes(Kind.ALL_TO_ALL, 1000, 4) == 750
    assert wire_bytes(Kind.BROADCAST, 1000, 4) == 1000
    assert all(wire_bytes(kind, 1000, 1) == 0 for kind in Kind)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    for size in (2, 3, 8):
        parts = wire_bytes(Kind.REDUCE_SCATTER, 4096, size) + wire_bytes(Kind.ALL_GATHER, 4096, size)
        assert wire_bytes(Kind.ALL_REDUCE, 4096, size) == pytest.approx(parts)
        assert ring_steps(Kind.ALL_REDUCE, size) == 2 * (size - 1)


def test_time_is_latency_plus_bytes_over_bandwidth() -> None:
    link = LinkModel(10, 100, 0.5, hop_us=3, slowdown={Kind.ALL_GATHER: 2})
    assert link.transfer_us(Kind.ALL_REDUCE, 1000, 2) == pytest.approx(10 + 10)
    assert link.transfer_us(Kind.ALL_GATHER, 1000, 2) == pytest.approx(10 + 10)
    assert link.transfer_us(Kind.ALL_REDUCE, 1000, 4) == pytest.approx(10 + 3 * 4 + 15)
    assert link.transfer_us(Kind.BROADCAST, 0, 2) == 10
    assert link.transfer_us(Kind.ALL_REDUCE, 1e9, 1) == 10


def test_time_grows_with_bytes_and_ranks() -> None:
    link = LinkModel(33, 332_000, 0.75, hop_us=1)
    times = [link.transfer_us(Kind.ALL_REDUCE, 1 << k, 4) for k in range(10, 30)]
    assert times == sorted(times)
    ranks = [link.transfer_us(Kind.ALL_REDUCE, 1 << 20, n) for n in range(2, 17)]
    assert ranks == sorted(ranks)
