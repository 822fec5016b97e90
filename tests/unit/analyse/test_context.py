"""The context keeps reasons in order."""

from __future__ import annotations

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.options import Options
from dcompile.plan import Verdict


def test_verdicts_are_kept_in_order_and_apart() -> None:
    costs = CostModel.analytical("cpu", 2)
    one, other = Context(Options(), costs), Context(Options(), costs)
    one.verdict("fuse", "k1", "not fused", "reads too much")
    one.verdict("overlap", "p0", "hidden", "under k1")
    assert one.verdicts == [
        Verdict("fuse", "k1", "not fused", "reads too much"),
        Verdict("overlap", "p0", "hidden", "under k1"),
    ]
    assert other.verdicts == []
