"""Wire time of collectives by the alpha-beta model, in microseconds. Byte convention: see ``rules.payload_bytes``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dcompile.collectives.nodes import Kind


@dataclass(frozen=True)
class LinkModel:
    """One backend on one kind of link.

    Attributes:
        alpha_us: time of an empty collective between two ranks, launch included.
        bytes_per_us: bus bandwidth (bytes through the busiest link) of a large all-reduce.
        contention: share of a collective's time that is added to compute running beside it: 0 hides entirely under
            compute, 1 hides nothing.
        hop_us: latency of each ring step beyond those of two ranks.
        slowdown: kinds whose large-message bandwidth is ``bytes_per_us / slowdown[kind]``; kinds not named have 1.
    """

    alpha_us: float
    bytes_per_us: float
    contention: float
    hop_us: float = 0.0
    slowdown: Mapping[Kind, float] = field(default_factory=dict)

    def transfer_us(self, kind: Kind, nbytes: float, group_size: int) -> float:
        """Time from launch to completion.

        Args:
            nbytes: the payload (``rules.payload_bytes``) of one rank.
            group_size: ranks; a group of one moves nothing and costs only its launch.
        """
        if group_size <= 1:
            return self.alpha_us
        latency_us = self.alpha_us + self.hop_us * (ring_steps(kind, group_size) - ring_steps(kind, 2))
        return latency_us + wire_bytes(kind, nbytes, group_size) * self.slowdown.get(kind, 1.0) / self.bytes_per_us


def ring_steps(kind: Kind, group_size: int) -> int:
    """Messages one rank sends one after another in the ring algorithm (Patarasuk and Yuan, JPDC 2009)."""
    return (2 if kind is Kind.ALL_REDUCE else 1) * max(group_size - 1, 0)


def wire_bytes(kind: Kind, nbytes: float, group_size: int) -> float:
    """Bytes each rank sends for a payload of ``nbytes``, by the bandwidth-optimal algorithm of each kind.

    all-reduce 2 (n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n, broadcast 1 (pipelined), times the payload.
    """
    if group_size <= 1:
        return 0.0
    if kind is Kind.BROADCAST:
        return float(nbytes)
    return ring_steps(kind, group_size) / group_size * nbytes
