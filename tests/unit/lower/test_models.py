"""Whole training steps: forward, backward, loss and optimizer leave nothing but matrix products to libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.lower.harness import check, externs

WIDTH, HEADS, VOCAB, LENGTH = 16, 2, 11, 6


class GptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, HEADS, -1).transpose(1, 2) for p in self.qkv(self.norm1(x)).split(WIDTH, -1))
        scores = (q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.outer(torch.arange(x.shape[2]).float(), 10000.0 ** (-torch.arange(half).float() / half))
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, t, HEADS, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = block()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, text: Tensor, labels: Tensor) -> Tensor:
        x = self.block(self.tokens(text) + self.places(torch.arange(text.shape[1])))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("block", [GptBlock, LlamaBlock])
def test_training_step(block: type[nn.Module], symbolic: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel(block)
    parameters = dict(model.named_parameters())

    def step(given: dict[str, Tensor], text: Tensor, labels: Tensor) -> list[Tensor]:
        def loss(given: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, given, (text, labels))

        gradients, value = torch.func.grad_and_value(loss)(given)
        return [value, *gradients.values()]

    graph = check(
        step, {n: p.detach() for n, p in parameters.items()}, tokens(0), tokens(1),
        decompose=True, symbolic=symbolic, rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    # decompositions allocate memory only to say a shape; nobody reads it
    read = [node for node in graph.nodes if any(graph.users[d.name] for d in node.defs) or node.has_effect]
    called = {op.split(".")[1] for op in externs(graph.with_nodes(tuple(read)))}
    assert called <= {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu",
                      "_scaled_dot_product_flash_attention_for_cpu_backward"}  # fmt: skip


@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_step(foreach: bool) -> None:
    def step(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Any:
        if foreach:
            p = torch._foreach_mul(p, 1 - 1e-3 * 0.1)
            m = torch._foreach_lerp(m, g, 0.1)
            v = torch._foreach_addcmul(torch._foreach_mul(v, 0.999), g, g, value=0.001)
            root = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(v), 0.03), 1e-8)
            return torch._foreach_addcdiv(p, m, root, value=-0.01), m, v
        p = [x * (1 - 1e-3 * 0.1) for x in p]
        m = [x.lerp(y, 0.1) for x, y in zip(m, g, strict=True)]
        v = [(x * 0.999).addcmul(y, y, value=0.001) for x, y in zip(v, g, strict=True)]
        root = [x.sqrt() / 0.03 + 1e-8 for x in v]
        return [x.addcdiv(y, z, value=-0.01) for x, y, z in zip(p, m, root, strict=True)], m, v

    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]

    graph = check(step, make(0), make(1), make(2), [x.abs() for x in make(3)])
    assert externs(graph) == []
