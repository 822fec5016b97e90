"""NCCL communicators that take few multiprocessors from the compute they run beside."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dcompile.runtime.board import at_new_world

CTAS = 4
"""Thread blocks, one a multiprocessor. Four carry 75 GB/s between H200s, three times what a network does; NCCL itself
takes up to 32."""

_groups: dict[str, dist.ProcessGroup] = {}


@at_new_world
def forget() -> None:
    """Groups of a former world are gone."""
    _groups.clear()


def few_ctas(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks in the same order whose collectives run in ``CTAS`` thread blocks.

    It is made when it is first asked for; all ranks of ``group`` must ask, at the same place of their programs.
    """
    name = str(group.group_name)
    if name not in _groups:
        options: Any = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas, options.config.max_ctas = 1, CTAS
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup), "this rank is one of them"
        _groups[name] = made
    return _groups[name]
