"""data_parallel in one process: state, errors, and which parameters it touches. Numbers are in tests/multi_gpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcompile.errors import DCompileError
from dcompile.parallel import data_parallel


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_needs_a_process_group() -> None:
    with pytest.raises(DCompileError, match="init_process_group"):
        data_parallel(_model())


@pytest.mark.usefixtures("alone")
class TestState:
    def test_keys_and_metadata_are_those_of_the_module(self) -> None:
        plain = _model()
        wrapped = data_parallel(_model())
        assert list(wrapped.state_dict()) == list(plain.state_dict())
        versions = dict(wrapped.state_dict()._metadata.items())
        assert versions == dict(plain.state_dict()._metadata)

    def test_loads_what_it_saves_and_what_the_module_saves(self) -> None:
        source = _model()
        for state in (source.state_dict(), data_parallel(source).state_dict()):
            target = data_parallel(_model())
            target.load_state_dict(state)
            torch.testing.assert_close(target.module.state_dict(), source.state_dict(), rtol=0, atol=0)

    def test_works_inside_another_module(self) -> None:
        holder = nn.ModuleDict({"a": data_parallel(_model()), "b": nn.Linear(2, 2)})
        plain = nn.ModuleDict({"a": _model(), "b": nn.Linear(2, 2)})
        assert list(holder.state_dict()) == list(plain.state_dict())
        holder.load_state_dict(plain.state_dict())
        torch.testing.assert_close(holder.state_dict(), plain.state_dict(), rtol=0, atol=0)

    def test_missing_and_unexpected_keys_are_reported(self) -> None:
        state = _model().state_dict()
        state["extra"] = state.pop("0.weight")
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight(.|\n)*Unexpected key.*extra"):
            data_parallel(_model()).load_state_dict(state)


@pytest.mark.usefixtures("alone")
def test_one_rank_computes_what_the_module_computes() -> None:
    model = _model()
    x = torch.randn(6, 4)
    wrapped = data_parallel(model)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(wrapped(x).square().sum(), list(wrapped.parameters()))
    torch.testing.assert_close(got, expected)
    assert wrapped.module is model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("module", "message"),
    [(nn.Embedding(5, 3, sparse=True), "sparse=False"), (nn.LazyLinear(3), "run one forward pass")],
)
def test_refuses_what_cannot_be_averaged(module: nn.Module, message: str) -> None:
    with pytest.raises(DCompileError, match=message):
        data_parallel(nn.Sequential(module))


@pytest.mark.usefixtures("alone")
def test_no_sync_ends_also_on_an_exception() -> None:
    wrapped = data_parallel(_model())
    with pytest.raises(ValueError, match="inside"), wrapped.no_sync():
        raise ValueError("inside")
    assert wrapped._synchronise
