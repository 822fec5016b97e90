"""One training step of whole models on one GPU, bf16 autocast, fused AdamW: every backend in one process.

    PYTHONPATH=.:launch python benchmarks/gpu_models.py [--models NAME ...] [--backends NAME ...]

Weights are random, data is random. ``first s`` is the first step, compiling included; a step is the median of the later
ones, the GPU synchronised around each; ``host`` is the part of it in which the host is busy launching. ``distance`` is
how far the gradients of the first step are from those of the same step in float64, in units of eager's own distance.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
os.environ.setdefault("DCOMPILE_CACHE_DIR", tempfile.mkdtemp(prefix="dcompile-gpu-"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcompile
from dcompile.backend import backend
from dcompile.options import Options

BACKENDS = ("eager", "inductor", "inductor max", "dcompile", "dcompile tuned", "dcompile graphs")
SETTLING = 8
"""Steps before the timed ones: allocators settle, and graphs are captured."""


@dataclass(frozen=True)
class Model:
    """A model and its data.

    Attributes:
        make: builds it on the CPU with random weights; returns the loss when called with ``data``.
        data: makes the inputs, on a device.
        exact: whether the first step is also run in float64, which large models have no memory for.
    """

    make: Callable[[], nn.Module]
    data: Callable[[str], tuple[Tensor, ...]]
    exact: bool = True


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions; (batch, heads, sequence, width)."""
    half = x.shape[-1] // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((width, hidden),) * 2 + ((hidden, width),))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm (GPT, Llama, ViT) or post-norm (BERT) transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int, kind: str) -> None:
        super().__init__()
        llama = kind == "llama"
        self.post = kind == "bert"
        norm: Callable[[], nn.Module] = (lambda: nn.RMSNorm(width)) if llama else (lambda: nn.LayerNorm(width))
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(width, heads, kind in ("gpt", "llama"), not llama, llama)
        plain = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.mlp = GatedMLP(width, hidden) if llama else plain

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """Language model of any of the kinds; mean cross entropy of targets given tokens."""

    def __init__(
        self, kind: str, layers: int, width: int, heads: int, hidden: int, vocabulary: int, context: int
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = None if kind == "llama" else nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, kind) for _ in range(layers))
        self.norm = nn.RMSNorm(width) if kind == "llama" else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class ViT(nn.Module):
    def __init__(self, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 196, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, 12, 4 * width, "vit") for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return F.cross_entropy(self.head(self.norm(self.layers(x)).mean(1)).float(), label)


class Classifier(nn.Module):
    """A torchvision network with its loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        self.net = getattr(torchvision.models, name)(weights=None)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(self.net(image).float(), label)


class UNet(nn.Module):
    """Four levels of two convolutions with batch norm, skip connections, one class for each pixel."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**n for n in range(5)]

        def block(ins: int, outs: int) -> nn.Module:
            pairs = [
                (nn.Conv2d(i, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()) for i in (ins, outs)
            ]
            return nn.Sequential(*(layer for pair in pairs for layer in pair))

        self.down = nn.ModuleList(block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(block(2 * w, w) for w in reversed(widths[:-1]))
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        kept = []
        x = image
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return F.binary_cross_entropy_with_logits(self.out(x).float(), mask)


def tokens(batch: int, context: int, vocabulary: int) -> Callable[[str], tuple[Tensor, ...]]:
    return lambda device: tuple(torch.randint(0, vocabulary, (2, batch, context), device=device).unbind())


def images(batch: int) -> Callable[[str], tuple[Tensor, ...]]:
    return lambda device: (
        torch.randn(batch, 3, 224, 224, device=device),
        torch.randint(0, 1000, (batch,), device=device),
    )


MODELS: dict[str, Model] = {
    "tiny": Model(lambda: Language("gpt", 2, 64, 2, 256, 512, 64), tokens(2, 64, 512)),
    "gpt2": Model(lambda: Language("gpt", 12, 768, 12, 3072, 50304, 1024), tokens(8, 1024, 50304)),
    "llama": Model(lambda: Language("llama", 20, 2048, 16, 5632, 32000, 1024), tokens(4, 1024, 32000), exact=False),
    "bert": Model(lambda: Language("bert", 12, 768, 12, 3072, 30522, 512), tokens(16, 512, 30522)),
    "vit": Model(ViT, images(64)),
    "resnet50": Model(lambda: Classifier("resnet50"), images(128)),
    "convnext": Model(lambda: Classifier("convnext_tiny"), images(64), exact=False),
    "unet": Model(UNet, lambda device: (torch.randn(8, 3, 256, 256, device=device),
                                        torch.rand(8, 1, 256, 256, device=device).round())),
}  # fmt: skip


def compiled(model: nn.Module, name: str) -> nn.Module:
    if name == "eager":
        return model
    if name.startswith("inductor"):
        return torch.compile(model, mode="max-autotune" if name.endswith("max") else None)  # type: ignore[return-value]
    options = Options.from_env({"cuda_graphs": name.endswith("graphs"), "autotune": name.endswith("tuned")})
    return torch.compile(model, backend=backend(options))  # type: ignore[return-value]


def gradients(model: nn.Module) -> Tensor:
    parts = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts)


def train(original: nn.Module, which: str, data: tuple[Tensor, ...], steps: int, device: str) -> dict[str, Any]:
    """Times and the gradients of the first step."""
    model = copy.deepcopy(original).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = compiled(model, which)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, host, losses = [], [], []
    found: dict[str, Any] = {}
    for step in range(steps + SETTLING + 1):
        wait()
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = call(*data)
        loss.backward()
        if step == 0:
            found["gradients"] = gradients(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        host.append(time.perf_counter() - began)
        wait()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    late = slice(SETTLING + 1, None)
    found |= {
        "first_s": seconds[0],
        "step_ms": statistics.median(seconds[late]) * 1000,
        "host_ms": statistics.median(host[late]) * 1000,
        "losses": losses,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    }
    return found


def measure(name: str, backends: list[str], steps: int, device: str) -> list[dict[str, Any]]:
    model = MODELS[name]
    torch.manual_seed(0)
    original, data = model.make(), model.data(device)
    exact = None
    if model.exact:
        exact = gradients_in_double(original, data, device)
    rows: list[dict[str, Any]] = []
    eager_distance = 0.0
    for which in backends:
        torch.compiler.reset()
        dcompile.reset_counters()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        row: dict[str, Any] = {"model": name, "backend": which}
        try:
            row |= train(original, which, data, steps, device)
            found = row.pop("gradients")
            if exact is not None:
                gap = float((found - exact).norm() / exact.norm())
                eager_distance = gap if which == "eager" else eager_distance
                row["distance"] = gap / eager_distance if eager_distance else gap
            del found
        except Exception:
            row["error"] = traceback.format_exc(limit=-6)
        if which.startswith("dcompile"):
            counted = dcompile.counters()
            row["launches"], row["library_calls"] = counted.kernel_launches, counted.library_calls
            row["fallbacks"], row["seconds"] = dict(counted.fallbacks), dict(counted.seconds)
        rows.append(row)
        print(text_of(row), flush=True)
    return rows


def gradients_in_double(original: nn.Module, data: tuple[Tensor, ...], device: str) -> Tensor:
    model = copy.deepcopy(original).double().to(device)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in data)
    model(*inputs).backward()
    return gradients(model)


def text_of(row: dict[str, Any]) -> str:
    head = f"{row['model']:<10}{row['backend']:<16}"
    if "error" in row:
        return f"{head}FAILED\n{row['error']}"
    text = f"{head}{row['first_s']:>8.1f}{row['step_ms']:>9.2f}{row['host_ms']:>8.2f}{row['peak_gb']:>7.2f}"
    text += f"{row.get('distance', float('nan')):>9.2f} {row['losses'][0]:>8.4f}{row['losses'][-1]:>9.4f}"
    if "launches" in row:
        text += f"  {row['launches']}, {row['library_calls']} {row['fallbacks'] or ''}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[name for name in MODELS if name != "tiny"], choices=MODELS)
    parser.add_argument("--backends", nargs="*", choices=BACKENDS,
                        default=["eager", "inductor", "dcompile", "dcompile graphs"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    where = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {where}, {os.cpu_count()} cores")
    print(
        f"{'model':<10}{'backend':<16}{'first s':>8}{'step ms':>9}{'host':>8}{'GB':>7}{'distance':>9} losses; launches"
    )
    rows: list[dict[str, Any]] = []
    facts = {"date": datetime.date.today().isoformat(), "device": where, "torch": torch.__version__}
    given.results.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        try:
            rows += measure(name, given.backends, given.steps, given.device)
        except Exception:
            print(f"{name}: FAILED\n{traceback.format_exc(limit=-4)}", flush=True)
        path = given.results / f"{facts['date']}-gpu_models.json"
        path.write_text(json.dumps({**facts, "command": sys.argv, "rows": rows}, indent=1))
    return int(any("error" in row and row["backend"].startswith("dcompile") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
