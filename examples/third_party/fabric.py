"""Lightning Fabric with dcompile: one line more.

torchrun --nproc-per-node 2 examples/third_party/fabric.py
"""

from __future__ import annotations

import os
import sys

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

STEPS, BATCH, WIDTH = 6, 32, 24


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.out = nn.Linear(WIDTH, 64), nn.LayerNorm(64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(nn.functional.gelu(self.wide(x))))  # type: ignore[no-any-return]


def main(argv: list[str]) -> list[float]:
    """Fits a sum of sines; returns the loss of each step."""
    fabric = Fabric(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy="ddp",
    )
    fabric.launch()
    torch.manual_seed(0)
    model: nn.Module = Network()
    if "--eager" not in argv:
        model = torch.compile(model, backend="dcompile")  # the line
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step * fabric.world_size + fabric.global_rank)
        x = torch.randn(BATCH, WIDTH, generator=generator).to(fabric.device)
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(fabric.all_reduce(loss.detach(), reduce_op="mean")))
        fabric.print(f"step {step + 1} loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
