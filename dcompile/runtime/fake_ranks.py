"""One process that takes itself for a rank of a large world: collectives end at once and move nothing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

FAKE = "fake"
"""The name of PyTorch's process group without peers."""

FAKE_MODULE = "torch.testing._internal.distributed.fake_pg"
"""Importing it registers ``FAKE``, which has no public way in."""


@contextmanager
def fake_ranks(rank: int, world: int) -> Iterator[None]:
    """While the block runs, this process is ``rank`` of ``world`` ranks that nobody has started.

    The environment is that of a launcher; the script's own ``init_process_group`` finds a group that is there already,
    whatever backend it asks for. New groups are fake as well. Ranks do not compare programs, for there are none.
    """
    importlib.import_module(FAKE_MODULE)
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    fixed = {"MASTER_ADDR": "localhost", "DCOMPILE_VERIFY_CROSS_RANK": "0", "DCOMPILE_COMPILE_ONCE": "0"}
    before = dict(os.environ)
    initialise, new_group, destroy = dist.init_process_group, dist.new_group, dist.destroy_process_group
    os.environ.update({name: str(value) for name, value in values.items()} | fixed)
    dist.init_process_group(FAKE, store=dist.HashStore(), rank=rank, world_size=world)  # type: ignore[attr-defined]

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, timeout, FAKE, *args, **kwargs)

    dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]
    dist.destroy_process_group = lambda *_, **__: None
    dist.new_group = fake_group  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.init_process_group, dist.new_group, dist.destroy_process_group = initialise, new_group, destroy
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
