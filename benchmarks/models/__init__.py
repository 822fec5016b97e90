"""Models of one training step each, shared by the tests (small) and the CPU benchmark (larger).

A model is a module whose call on ``inputs`` gives the loss, a scalar. Weights and inputs are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

Scale = Literal["test", "bench"]


@dataclass(frozen=True)
class Step:
    """One training step: ``module(*inputs)`` is the loss."""

    module: nn.Module
    inputs: tuple[Any, ...]


HOMES: dict[str, tuple[str, ...]] = {
    "language": ("gpt2", "llama", "bert", "t5", "mixtral"),
    "vision": ("vit", "resnet18", "convnext", "mobilenet", "unet", "mixer"),
    "other": ("lstm", "dlrm", "gnn", "vae"),
}
"""Models by the module that builds each: ``builder(small, dropout)`` gives the module and its inputs."""

MODELS = tuple(name for names in HOMES.values() for name in names)

RANDOM = ("gpt2", "bert", "t5", "lstm")
"""Models that drop out; others ignore ``dropout``. Their compiled masks are not eager's: the generators differ."""


def build(name: str, scale: Scale = "test", dropout: float = 0.0, seed: int = 0) -> Step:
    """The model ``name`` in training mode, always the same for the same seed; the process's generator is seeded too."""
    home = next(home for home, names in HOMES.items() if name in names)
    builder = getattr(import_module(f"benchmarks.models.{home}"), name)  # not all of them need transformers
    torch.manual_seed(seed)
    module, inputs = builder(scale == "test", dropout)
    return Step(module.train(), inputs)
