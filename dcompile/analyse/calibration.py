"""Measured prices of one group of ranks, and how they replace the documented defaults of the cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dcompile.analyse.cost import CostModel, Roofline
from dcompile.collectives.cost import Curve, LinkModel
from dcompile.collectives.nodes import Kind
from dcompile.ir.types import DType


@dataclass(frozen=True)
class Calibration:
    """What was measured, equal on all ranks.

    Attributes:
        ranks: size of the group.
        curves: for each kind (payload bytes, microseconds), by ascending size.
        contention: see ``LinkModel``.
        matmul_flops_per_us: f32 matrix products on one rank.
        bytes_per_us: bytes read plus written by one rank.
    """

    ranks: int
    curves: Mapping[Kind, tuple[tuple[int, float], ...]]
    contention: float
    matmul_flops_per_us: float
    bytes_per_us: float

    def to_json(self) -> str:
        """Exactly this, as text."""
        curves = {kind.value: list(map(list, points)) for kind, points in self.curves.items()}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "curves"}
        return json.dumps({"curves": curves, **fields}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """The calibration of which ``text`` is the JSON."""
        fields = json.loads(text)
        curves = {
            Kind(kind): tuple((int(size), float(us)) for size, us in points)
            for kind, points in fields.pop("curves").items()
        }
        return Calibration(curves=curves, **fields)

    def link(self, default: LinkModel) -> LinkModel:
        """``default`` with what was measured in its place."""
        curves = {kind: Curve.monotone(points) for kind, points in self.curves.items()}
        return replace(default, contention=self.contention, curves=curves, measured_ranks=self.ranks)


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
