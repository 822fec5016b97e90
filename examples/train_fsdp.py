"""Trains the GPT of train_gpt.py with its parameters, gradients and optimizer state spread over the ranks (FSDP2).

    dcompile-launch --nproc 2 examples/train_fsdp.py --backend dcompile
    torchrun --nproc-per-node 2 examples/train_fsdp.py --backend eager

Everything else is train_gpt.py's: data, options, checkpoints. Checkpoints move between backends and numbers of ranks.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from train_gpt import main


def sharded(model: nn.Module, given: argparse.Namespace, device: torch.device) -> nn.Module:
    """``fully_shard`` on each block and the whole; dcompile then takes the gathers and reductions into its graphs."""
    if not dist.is_initialized():
        raise SystemExit("train_fsdp.py needs ranks: dcompile-launch --nproc 2 examples/train_fsdp.py")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if given.backend == "dcompile":
        import dcompile

        return dcompile.compile(model, timeline=True)
    if given.backend == "inductor":
        for block in model.blocks:
            block.compile()
    return model


if __name__ == "__main__":
    sys.exit(main(wrap=sharded))
