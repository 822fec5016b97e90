"""Capture and data parallelism on two ranks. The captured graphs run with eager ops over gloo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dcompile.capture import graph_breaks, group_names, reset_graph_breaks
from dcompile.errors import Divergence
from dcompile.parallel import data_parallel
from tests.multi_gpu.eager_backend import EagerBackend
from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank


class Tied(nn.Module):
    """A language-model-like net: embedding tied to the output layer, one frozen layer, one unused one, a norm with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.hidden = nn.Linear(8, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens))
        return self.output(torch.tanh(self.hidden(self.frozen(x))) * self.scale)


def _loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.replace("_orig_mod.", "").replace("module.", ""): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def _data_parallel(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # different weights: the wrappers must make them equal
    model = Tied()
    plain, ours = DistributedDataParallel(copy.deepcopy(model)), data_parallel(copy.deepcopy(model))
    backend = EagerBackend()
    reset_graph_breaks()
    compiled = torch.compile(ours, backend=backend)
    tokens = torch.randint(0, 11, (3, 5))
    losses = [_loss(plain, tokens), _loss(compiled, tokens)]
    for loss in losses:
        loss.backward()
    eager = data_parallel(copy.deepcopy(model))
    _loss(eager, tokens).backward()
    expected, got, uncompiled = _gradients(plain), _gradients(ours), _gradients(eager)
    assert expected.keys() == got.keys() == uncompiled.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(uncompiled[name], gradient, rtol=1e-6, atol=1e-7)
    return {
        "losses": [loss.item() for loss in losses],
        "kinds": backend.kinds(),
        "breaks": graph_breaks(),
        "backward": backend.ops(1),
        "gradients": sorted(got),
        "keys": list(ours.state_dict()),
        "expected_keys": list(model.state_dict()),
        "weights": ours.state_dict(),
        "groups": [group_names(captured.gm) for captured in backend.graphs],
    }


def test_data_parallel_equals_eager_ddp() -> None:
    first, second = run_ranks(_data_parallel)
    for result in (first, second):
        assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
        assert result["kinds"] == ["forward", "backward"]
        assert result["breaks"] == 0
        assert result["keys"] == result["expected_keys"]
        launches = result["backward"].count("_c10d_functional.all_reduce.default")
        assert (
            launches == result["backward"].count("_c10d_functional.wait_tensor.default") == 5
        )  # tied once, frozen never
        assert result["gradients"] == ["embedding.weight", "hidden.bias", "hidden.weight", "norm.bias", "norm.weight"]
        assert result["groups"][0] == []
        assert len(result["groups"][1]) == 1
    assert first["backward"] == second["backward"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


if __name__ == "__main__":
    test_data_parallel_equals_eager_ddp()
