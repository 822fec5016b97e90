"""Measured prices of one group of ranks, and how they replace the documented defaults of the cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dcompile.analyse.cost import NVLINK_PEERS, CostModel, Roofline
from dcompile.collectives.cost import Curve, LinkModel
from dcompile.collectives.nodes import Kind, Via
from dcompile.ir.types import DType


@dataclass(frozen=True)
class Prices:
    """One lowering of collectives: see ``Calibration`` for both."""

    curves: Mapping[Kind, tuple[tuple[int, float], ...]]
    contention: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, equal on all ranks.

    Attributes:
        ranks: size of the group.
        curves: for each kind (payload bytes, microseconds), by ascending size.
        contention: see ``LinkModel``.
        matmul_flops_per_us: f32 matrix products on one rank.
        bytes_per_us: bytes read plus written by one rank.
        others: what collectives cost by the lowerings that can be used instead of the backend's own.
    """

    ranks: int
    curves: Mapping[Kind, tuple[tuple[int, float], ...]]
    contention: float
    matmul_flops_per_us: float
    bytes_per_us: float
    others: Mapping[Via, Prices] = field(default_factory=dict)

    def to_json(self) -> str:
        """Exactly this, as text."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["curves"] = _named(self.curves)
        fields["others"] = {
            via.value: {"curves": _named(prices.curves), "contention": prices.contention}
            for via, prices in self.others.items()
        }
        return json.dumps(fields, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """The calibration of which ``text`` is the JSON."""
        fields = json.loads(text)
        others = {
            Via(via): Prices(_curves(found["curves"]), found["contention"])
            for via, found in fields.pop("others").items()
        }
        return Calibration(curves=_curves(fields.pop("curves")), others=others, **fields)

    def link(self, default: LinkModel) -> LinkModel:
        """``default`` with what was measured in its place."""
        defaults = {Via.FEW_CTAS: default, Via.PEERS: NVLINK_PEERS}
        others = {via: self._filled(defaults[via], one.curves, one.contention) for via, one in self.others.items()}
        return replace(self._filled(default, self.curves, self.contention), others=others)

    def _filled(
        self, default: LinkModel, points: Mapping[Kind, tuple[tuple[int, float], ...]], contention: float
    ) -> LinkModel:
        curves = {kind: Curve.monotone(measured) for kind, measured in points.items()}
        return replace(default, contention=contention, curves=curves, measured_ranks=self.ranks)


def _named(curves: Mapping[Kind, tuple[tuple[int, float], ...]]) -> dict[str, list[list[float]]]:
    return {kind.value: list(map(list, points)) for kind, points in curves.items()}


def _curves(named: Mapping[str, list[list[float]]]) -> dict[Kind, tuple[tuple[int, float], ...]]:
    return {Kind(kind): tuple((int(size), float(us)) for size, us in points) for kind, points in named.items()}


def calibrated(costs: CostModel, device: str, groups: Mapping[str, Calibration]) -> CostModel:
    """``costs`` with measured links for the group labels in ``groups``, and measured compute on ``device``.

    Other element types of matrix products keep their ratio to f32.
    """
    if not groups:
        return costs
    links = {**costs.links, **{label: found.link(costs.link(label)) for label, found in groups.items()}}
    first = groups[min(groups)]
    roof = costs.roofline(device)
    factor = first.matmul_flops_per_us / roof.matmul_flops_per_us.get(DType.F32, roof.flops_per_us)
    measured: Roofline = replace(
        roof,
        bytes_per_us=first.bytes_per_us,
        flops_per_us=roof.flops_per_us * factor,
        matmul_flops_per_us={dtype: flops * factor for dtype, flops in roof.matmul_flops_per_us.items()},
    )
    return CostModel({**costs.compute, device: measured}, links)
