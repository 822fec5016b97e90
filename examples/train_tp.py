"""Trains the GPT of train_gpt.py tensor parallel: heads and hidden units of a block are spread over ``--tensor`` ranks.

    dcompile-launch --nproc 2 examples/train_tp.py                    # one copy of the model on two ranks
    dcompile-launch --nproc 4 examples/train_tp.py --tensor 2         # and fully sharded over two such pairs

Everything else is train_gpt.py's: data, options, checkpoints. Ranks that share a copy of the model see the same data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from train_gpt import main


def arguments(add: Callable[..., object]) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    add("--tensor", type=int, default=ranks, help="ranks that share one copy of the model (default: all)")


def spread(model: nn.Module, given: argparse.Namespace, device: torch.device) -> nn.Module:
    """Columns of the first and rows of the second of two following products on each rank: one all-reduce a pair."""
    if not dist.is_initialized():
        raise SystemExit("train_tp.py needs ranks: dcompile-launch --nproc 2 examples/train_tp.py")
    copies = dist.get_world_size() // given.tensor
    mesh = init_device_mesh(device.type, (copies, given.tensor), mesh_dim_names=("data", "tensor"))
    plan = {
        "qkv": ColwiseParallel(),
        "merge": RowwiseParallel(),
        "widen": ColwiseParallel(),
        "narrow": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], plan)
    if copies > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    if given.backend == "dcompile":
        import dcompile

        return dcompile.compile(model, timeline=True)
    return torch.compile(model) if given.backend == "inductor" else model


if __name__ == "__main__":
    sys.exit(main(wrap=spread, extend=arguments))
