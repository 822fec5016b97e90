"""Who communicates. A group in a graph is a slot; which processes fill it is run-time data: artifacts fit any rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A communication group.

    Attributes:
        label: ``"g0"``, ``"g1"``, … in order of first use in the program; equal on all ranks.
        size: number of ranks.
    """

    label: str
    size: int
