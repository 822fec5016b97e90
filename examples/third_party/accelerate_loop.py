"""A training loop of Hugging Face Accelerate with dcompile: one line more.

torchrun --nproc-per-node 2 examples/third_party/accelerate_loop.py
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, BATCH, WIDTH, CLASSES = 6, 32, 24, 5


def dataset() -> TensorDataset:
    """Points labelled by the largest of a few random projections."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(STEPS * BATCH * 8, WIDTH, generator=generator)
    return TensorDataset(points, (points @ torch.randn(WIDTH, CLASSES, generator=generator)).argmax(1))


def main(argv: list[str]) -> list[float]:
    """Learns the labels; returns the loss of each step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, CLASSES))
    if "--eager" not in argv:
        model = torch.compile(model, backend="dcompile")  # the line
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset(), batch_size=BATCH))
    losses = []
    for step, (points, labels) in zip(range(STEPS), loader, strict=False):
        loss = nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        accelerator.print(f"step {step + 1} loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
