"""A recurrent language model, a recommender, a graph network, a variational autoencoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Cell(nn.Module):
    """One long short-term memory cell, written out: one matmul for the input, one for the state, four gates."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(inner, 4 * width)
        self.state = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        i, f, g, o = (self.input(x) + self.state(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class RecurrentLanguageModel(nn.Module):
    """Embedding, layers of cells unrolled over time, a linear head; the loss predicts the next token."""

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cells = nn.ModuleList([Cell(width, width) for _ in range(layers)])
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)
        self.width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens[:, :-1])
        steps = list(x.unbind(1))
        for cell in self.cells:
            h = c = x.new_zeros(x.shape[0], self.width)
            for time, step in enumerate(steps):
                h, c = cell(step, h, c)
                steps[time] = self.drop(h)
        logits = self.head(torch.stack(steps, 1))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def lstm(small: bool, dropout: float) -> Built:
    vocabulary, width, batch, length = (50, 16, 3, 6) if small else (4096, 256, 16, 25)
    model = RecurrentLanguageModel(vocabulary, width, 2, dropout)
    return model, (torch.randint(vocabulary, (batch, length)),)


def _mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))


class Recommender(nn.Module):
    """Bags of categories are embedded, dense features pass an MLP, all pairs of vectors interact by dot products."""

    def __init__(self, tables: int, rows: int, width: int, dense: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables)])
        self.bottom = _mlp(dense, 4 * width, width)
        self.top = _mlp(width + tables * (tables + 1) // 2, 8 * width, 4 * width)
        self.head = nn.Linear(4 * width, 1)
        pairs = torch.tril_indices(tables + 1, tables + 1, -1)
        self.register_buffer("pairs", pairs[0] * (tables + 1) + pairs[1])

    def forward(
        self, dense: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        x = self.bottom(dense)
        bags = [table(indices[n], offsets[n]) for n, table in enumerate(self.tables)]
        vectors = torch.stack([x, *bags], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        logits = self.head(self.top(torch.cat([x, products[:, self.pairs]], 1)))
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), labels)


def dlrm(small: bool, dropout: float) -> Built:
    tables, rows, width, batch, bag = (3, 20, 8, 5, 3) if small else (8, 5000, 64, 1024, 10)
    indices = torch.randint(rows, (tables, batch * bag))
    offsets = (torch.arange(batch) * bag).repeat(tables, 1)
    labels = torch.randint(2, (batch,)).float()
    return Recommender(tables, rows, width, 13), (torch.randn(batch, 13), indices, offsets, labels)


class GraphLayer(nn.Module):
    """Graph attention: a softmax over each node's incoming edges by scatter, then a weighted sum of the neighbours."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.project = nn.Linear(inner, outer)
        self.sender, self.receiver = nn.Linear(outer, 1), nn.Linear(outer, 1)
        self.norm = nn.LayerNorm(outer)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges[0], edges[1]
        h = self.project(x)
        score = F.leaky_relu(self.sender(h)[source] + self.receiver(h)[target], 0.2).squeeze(1)
        count = x.shape[0]
        top = score.detach().new_full((count,), -1e30).scatter_reduce(0, target, score.detach(), "amax")
        weight = torch.exp(score - top[target])
        total = weight.new_zeros(count).scatter_add(0, target, weight)
        weight = weight / (total[target] + 1e-9)
        gathered = torch.zeros_like(h).index_add(0, target, h[source] * weight.unsqueeze(1))
        return F.elu(self.norm(gathered + h))


class GraphNetwork(nn.Module):
    """Layers of graph attention, a class for each node."""

    def __init__(self, inner: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [inner] + [width] * layers
        self.layers = nn.ModuleList([GraphLayer(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return F.cross_entropy(self.head(x), labels)


def gnn(small: bool, dropout: float) -> Built:
    nodes, edges, width = (12, 40, 8) if small else (4000, 40000, 128)
    inputs = torch.randn(nodes, width), torch.randint(nodes, (2, edges)), torch.randint(7, (nodes,))
    return GraphNetwork(width, width, 3), inputs


class Autoencoder(nn.Module):
    """A convolutional variational autoencoder. The noise of its latent is an input, so that steps can be compared."""

    def __init__(self, width: int, latent: int, side: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.1)
        )
        self.small = (2 * width, side // 4, side // 4)
        flat = 2 * width * (side // 4) ** 2
        self.moments, self.expand = nn.Linear(flat, 2 * latent), nn.Linear(latent, flat)
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.LeakyReLU(0.1), nn.ConvTranspose2d(width, 3, 4, 2, 1)
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, logvar = self.moments(self.encode(images).flatten(1)).chunk(2, 1)
        latent = mean + noise * torch.exp(0.5 * logvar)
        out = torch.sigmoid(self.decode(self.expand(latent).unflatten(1, self.small)))
        divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1).mean()
        return F.mse_loss(out, images) + 1e-3 * divergence


def vae(small: bool, dropout: float) -> Built:
    width, latent, side, batch = (8, 4, 16, 2) if small else (32, 64, 64, 16)
    return Autoencoder(width, latent, side), (torch.rand(batch, 3, side, side), torch.randn(batch, latent))
