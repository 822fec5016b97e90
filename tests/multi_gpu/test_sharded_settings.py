"""Every setting of FSDP2 is followed, named in a warning as without effect, or refused; never ignored."""

from __future__ import annotations

import contextlib
import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dcompile.fsdp import DECIDED_HERE, FOLLOWED, REFUSED
from tests.multi_gpu.ranks import run_ranks

ranks = [pytest.mark.multi_rank, pytest.mark.slow]

WIDTH = 8


class Model(nn.Module):
    """Two layers that are always used, one that never is, and a parameter that is not used by its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def first_alone(self, x: Tensor) -> Tensor:
        return self.first(x)


def _model(**options: Any) -> Model:
    torch.manual_seed(0)
    model = Model()
    for part in (model.first, model.unused, model.last):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def _float16() -> Model:
    return _model(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))


def _each(model: Model, name: str, *given: Any) -> None:
    """Call a setter that does not recurse on every fully sharded module."""
    for part in (model.first, model.unused, model.last, model):
        getattr(part, name)(*given)


def _summing() -> Model:
    """gloo cannot multiply before it sums."""
    model = _model()
    _each(model, "set_force_sum_reduction_for_comms", True)
    return model


def _partly(model: Model, step: int) -> None:
    model.set_requires_all_reduce(step % 3 == 2)


def _locally_then_partly(model: Model, step: int) -> None:
    model.set_requires_gradient_sync(step % 4 != 0)
    model.set_requires_all_reduce(step % 4 == 3)


def _hybrid() -> Model:
    return _model(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def _first(call: Callable[[Model], None]) -> Callable[[Model, int], None]:
    return lambda model, step: call(model) if step == 0 else None


Case = tuple[Callable[[], Model], Callable[[Model, int], None]]
"""How the model is made, and what is called on it before each of four steps, whose gradients add up."""

TWO: dict[str, Case] = {
    "set_gradient_divide_factor": (_summing, lambda m, step: _each(m, "set_gradient_divide_factor", 3.0 + step)),
    "set_reduce_scatter_divide_factor": (_float16, _first(lambda m: _each(m, "set_reduce_scatter_divide_factor", 8.0))),
    "set_force_sum_reduction_for_comms": (
        _model,
        _first(lambda m: _each(m, "set_force_sum_reduction_for_comms", True)),
    ),
    "set_reduce_scatter_unused_params": (_model, _first(lambda m: m.set_reduce_scatter_unused_params(True))),
    "set_separate_reduce_scatter_group": (_model, _first(lambda m: m.set_separate_reduce_scatter_group(True))),
    "set_reshard_after_forward": (_model, lambda m, step: m.set_reshard_after_forward(step % 2 == 0)),
    "set_is_last_backward": (_model, lambda m, step: m.set_is_last_backward(step == 3)),
    "set_unshard_in_backward": (_model, _first(lambda m: m.unused.set_unshard_in_backward(False))),
    "set_requires_gradient_sync": (_model, lambda m, step: m.set_requires_gradient_sync(step % 2 == 1)),
    "reshard": (_model, lambda m, step: _each(m, "reshard")),
}
FOUR: dict[str, Case] = {
    "set_requires_all_reduce": (_hybrid, _partly),
    "set_requires_gradient_sync": (_hybrid, _locally_then_partly),
    "reshard_after_forward=2": (lambda: _model(reshard_after_forward=2), lambda *_: None),
}
COMPILED_FOUR = ("set_requires_all_reduce", "reshard_after_forward=2")
COMPILED_TWO = ("set_reduce_scatter_unused_params", "set_gradient_divide_factor")


def _gradients(case: Case, rank: int, way: str, folder: str) -> dict[str, Any]:
    """Gradients after each of four steps, and what the compiled backward programs gather: rows and group sizes."""
    import dcompile
    from dcompile.backend import observing
    from dcompile.collectives.nodes import Kind, Start

    torch.compiler.reset()
    make, setting = case
    model = make()
    run: Callable[[Tensor], Tensor] = model
    if way == "wrapped":
        run = dcompile.fully_sharded(model)
    elif way == "compiled":
        run = dcompile.compile(model, fullgraph=True, cache_dir=folder)
    found: list[dict[str, Tensor | None]] = []
    gathers: list[tuple[str, int]] = []

    def observe(built: Any) -> None:
        for node in built.plan.graph.nodes:
            if isinstance(node, Start) and node.kind is Kind.ALL_GATHER:
                gathers.append((built.name.rstrip("0123456789"), node.group.size))

    with observing(observe):
        for step in range(4):
            setting(model, step)
            generator = torch.Generator().manual_seed(10 * step + rank)
            run(torch.randn(3, WIDTH, generator=generator)).square().mean().backward()
            found.append(
                {n: p.grad.to_local().clone() if p.grad is not None else None for n, p in model.named_parameters()}
            )
    return {"gradients": found, "gathers": gathers}


def _all(rank: int, cases: dict[str, tuple[str, ...]], which: str, folder: str) -> dict[str, Any]:
    table = {"TWO": TWO, "FOUR": FOUR}[which]
    warnings.simplefilter("error", UserWarning)
    return {name: {way: _gradients(table[name], rank, way, folder) for way in ways} for name, ways in cases.items()}


def _ways(table: dict[str, Case], compiled: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {name: ("eager", "wrapped", *(["compiled"] if name in compiled else [])) for name in table}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(_all, _ways(TWO, COMPILED_TWO), "TWO", folder, deadline_s=280)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(_all, _ways(FOUR, COMPILED_FOUR), "FOUR", folder, world=4, deadline_s=280)


def _check(results: list[dict[str, Any]], name: str) -> None:
    tolerance = 2e-3 if name == "set_reduce_scatter_divide_factor" else 2e-5
    for result in results:
        for way in result[name]:
            for ours, eager in zip(result[name][way]["gradients"], result[name]["eager"]["gradients"], strict=True):
                assert {n for n, g in ours.items() if g is None} == {n for n, g in eager.items() if g is None}, way
                torch.testing.assert_close(
                    {n: g for n, g in ours.items() if g is not None},
                    {n: g for n, g in eager.items() if g is not None},
                    atol=tolerance,
                    rtol=tolerance,
                    msg=lambda text, way=way: f"{way}: {text}",
                )


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_a_followed_setting_gives_eagers_gradients(two: list[dict[str, Any]], name: str) -> None:
    _check(two, name)


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_a_followed_setting_gives_eagers_gradients_on_four_ranks(four: list[dict[str, Any]], name: str) -> None:
    _check(four, name)


@pytest.mark.multi_rank
@pytest.mark.slow
def test_pieces_are_gathered_over_the_smaller_group(four: list[dict[str, Any]]) -> None:
    gathers = four[0]["reshard_after_forward=2"]["compiled"]["gathers"]
    assert {size for name, size in gathers if name == "forward"} == {4}
    assert {size for name, size in gathers if name == "backward"} == {2}


def test_every_method_is_in_one_list() -> None:
    public = {name for name, value in vars(FSDPModule).items() if callable(value) and not name.startswith("_")}
    listed = [*FOLLOWED, *DECIDED_HERE, *REFUSED]
    assert len(listed) == len(set(listed))
    assert not public - set(listed), "a method of this torch release is in none of the lists of dcompile.fsdp"


def test_every_followed_setting_has_a_case() -> None:
    elsewhere = {"reset_iter_state", "set_post_optim_event"}
    assert set(FOLLOWED) == elsewhere | {name for name in (*TWO, *FOUR) if "=" not in name}


def test_arguments_of_fully_shard_and_its_policy_are_known() -> None:
    arguments = set(inspect.signature(fully_shard).parameters)
    known = {"module", "mesh", "reshard_after_forward", "shard_placement_fn", "mp_policy", "offload_policy"}
    assert arguments <= known | {"ignored_params", "dp_mesh_dims"}
    policy = {field.name for field in fields(MixedPrecisionPolicy)}
    assert policy == {"param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs"}


@pytest.fixture
def single() -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_setting_is_an_error_with_the_way_out(single: None, name: str) -> None:
    import dcompile
    from dcompile.errors import DCompileError

    model = _model()
    dcompile.fully_sharded(model)
    with pytest.raises(DCompileError, match=f"FSDPLinear.{name} is not followed.*{REFUSED[name][:20]}"):
        getattr(model.first, name)(None)


GIVEN: dict[str, tuple[Any, ...]] = {
    "set_reshard_after_backward": (False,),
    "set_modules_to_forward_prefetch": ([],),
    "set_modules_to_backward_prefetch": ([],),
    "set_reduce_scatter_max_input_buffers": (2,),
    "set_allocate_memory_from_process_group_for_comm": (True,),
    "set_symm_mem_for_comm": ("NCCL",),
}


@pytest.mark.parametrize("name", DECIDED_HERE)
def test_a_setting_without_effect_is_named(single: None, name: str) -> None:
    import dcompile

    model = _model()
    if not hasattr(model, name):
        pytest.skip("this torch release does not have it")
    dcompile.fully_sharded(model)
    call = functools.partial(getattr(model, name), *GIVEN[name])
    needs_nccl = contextlib.suppress(RuntimeError, NotImplementedError, ValueError, AssertionError)
    with pytest.warns(UserWarning, match=f"{name} has no effect on the compiled program"), needs_nccl:
        call()


def test_a_setting_without_effect_that_was_made_before_is_named(single: None) -> None:
    import dcompile

    model = _model()
    model.first.set_modules_to_forward_prefetch([model.last])
    model.set_reshard_after_backward(False)
    with pytest.warns(UserWarning, match="has no effect on the compiled program") as seen:
        dcompile.fully_sharded(model)
    text = "\n".join(str(warning.message) for warning in seen)
    assert "set_modules_to_forward_prefetch" in text
    assert "set_reshard_after_backward" in text


def test_registered_forward_methods_are_refused(single: None) -> None:
    import dcompile
    from dcompile.errors import DCompileError

    model = _model()
    register_fsdp_forward_method(model, "first_alone")
    with pytest.raises(DCompileError, match="register_fsdp_forward_method"):
        dcompile.fully_sharded(model)
    model = _model()
    dcompile.fully_sharded(model)
    register_fsdp_forward_method(model, "first_alone")
    with pytest.raises(DCompileError, match="register_fsdp_forward_method"):
        model.first_alone(torch.ones(2, WIDTH))


def test_reset_drops_unreduced_gradients(single: None) -> None:
    import dcompile

    model = _model()
    run = dcompile.fully_sharded(model)
    if not hasattr(model, "reset_iter_state"):
        pytest.skip("this torch release does not have it")
    model.set_requires_gradient_sync(False)
    run(torch.randn(3, WIDTH)).sum().backward()
    model.reset_iter_state()
    model.set_requires_gradient_sync(True)
    x = torch.randn(3, WIDTH)
    run(x).sum().backward()
    assert model.last.bias.grad is not None
    torch.testing.assert_close(model.last.bias.grad.to_local(), torch.full((WIDTH,), 3.0))


def test_user_hooks_stay_in_their_order(single: None) -> None:
    import dcompile

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    seen: dict[str, list[torch.dtype]] = {"eager": [], "ours": []}
    for way in seen:
        model = _model(mp_policy=policy)
        model.first.register_forward_pre_hook(lambda _, args, way=way: seen[way].append(args[0].dtype))
        model.first.register_forward_hook(lambda _, __, output, way=way: seen[way].append(output.dtype))
        run = model if way == "eager" else dcompile.fully_sharded(model)
        run(torch.randn(3, WIDTH))
    assert seen["ours"] == seen["eager"] == [torch.bfloat16, torch.float32]
