"""Whether the all-reduces of a wrapped module's backward program are to happen, decided anew by each forward pass.

A program names the group of such all-reduces by the name of a ``Duty``. While the duty is ``alone`` each rank keeps its
own gradients, as under ``DistributedDataParallel.no_sync``; so one compiled program serves both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch.distributed as dist

_numbers = itertools.count()


@dataclass(eq=False)
class Duty:
    """The averaging of one module's gradients.

    Attributes:
        group: ranks that hold copies.
        alone: leave gradients as they are.
        launched: an all-reduce of the current backward pass has been launched by a compiled program.
        name: what programs call the group.
    """

    group: dist.ProcessGroup
    alone: bool = False
    launched: bool = False
    name: str = field(default_factory=lambda: f"dcompile/duty{next(_numbers)}")

    def __post_init__(self) -> None:
        _duties[self.name] = self


_duties: WeakValueDictionary[str, Duty] = WeakValueDictionary()


def duty_named(name: object) -> Duty | None:
    """The duty called ``name``; None for the name of an ordinary group."""
    return _duties.get(str(name))
