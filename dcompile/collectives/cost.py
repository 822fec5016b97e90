"""Wire time of collectives by the alpha-beta model, in microseconds. Byte convention: see ``rules.payload_bytes``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dcompile.collectives.nodes import Kind, Via


@dataclass(frozen=True)
class Curve:
    """Measured times, linear between sizes: an alpha-beta model for each range of sizes. Never falls with the size.

    Attributes:
        points: (bytes, microseconds), both ascending; at least one.
    """

    points: tuple[tuple[int, float], ...]

    @staticmethod
    def monotone(points: Sequence[tuple[int, float]]) -> Curve:
        """The nearest curve (least squares) to ``points`` that never falls: neighbours that fall are averaged.

        Pool adjacent violators (Ayer et al., Ann. Math. Stat. 1955).
        """
        pools: list[tuple[float, int]] = []
        for _, us in sorted(points):
            pools.append((us, 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (a, n), (b, m) = pools[-2], pools[-1]
                pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
        times = [us for us, count in pools for _ in range(count)]
        return Curve(tuple(zip((size for size, _ in sorted(points)), times, strict=True)))

    def at(self, nbytes: float) -> float:
        """Microseconds for ``nbytes``: below the first size as there, beyond the last on the line of the last two."""
        sizes = [size for size, _ in self.points]
        if nbytes <= sizes[0] or len(sizes) == 1:
            return self.points[0][1]
        right = min(bisect_left(sizes, nbytes), len(sizes) - 1)
        (left_size, left_us), (right_size, right_us) = self.points[right - 1 : right + 1]
        return left_us + (nbytes - left_size) * (right_us - left_us) / (right_size - left_size)


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
        curves: measured times of kinds between ``measured_ranks`` ranks; they replace the formula there.
        others: prices of the lowerings that can be used instead of the backend's own.
    """

    alpha_us: float
    bytes_per_us: float
    contention: float
    hop_us: float = 0.0
    slowdown: Mapping[Kind, float] = field(default_factory=dict)
    curves: Mapping[Kind, Curve] = field(default_factory=dict)
    measured_ranks: int = 0
    others: Mapping[Via, LinkModel] = field(default_factory=dict)

    def by(self, via: Via) -> LinkModel:
        """The prices of a lowering; a ``KeyError`` if the link has none such."""
        return self if via is Via.LIBRARY else self.others[via]

    def transfer_us(self, kind: Kind, nbytes: float, group_size: int) -> float:
        """Time from launch to completion.

        Args:
            nbytes: the payload (``rules.payload_bytes``) of one rank.
            group_size: ranks; a group of one moves nothing and costs only its launch.
        """
        if group_size <= 1:
            return self.alpha_us
        if group_size == self.measured_ranks and kind in self.curves:
            return self.curves[kind].at(nbytes)
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
