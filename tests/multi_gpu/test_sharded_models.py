"""One forward and one backward graph, no break: GPT-2, Llama and ViT in every way of sharding; and what else people do
with a sharded model. Graphs are captured here and interpreted op by op; that they compile is tested elsewhere.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dcompile.capture import Captured, capture, graph_breaks, reset_graph_breaks
from dcompile.errors import DCompileError
from dcompile.runtime.fake_ranks import fake_ranks
from dcompile.sharded import fully_sharded
from tests.multi_gpu.ranks import run_ranks


def interpreted(counts: Counter[str]) -> Callable[..., Any]:
    """A backend that counts captured graphs by kind, and their gathers and reductions, and runs them op by op."""

    def compile_captured(captured: Captured) -> Callable[[list[Any]], Any]:
        counts[captured.kind] += 1
        for node in captured.gm.graph.nodes:
            name = str(node.target).partition("_c10d_functional.")[2].partition(".")[0]
            if name and name != "wait_tensor":
                counts[f"{captured.kind} {name}"] += 1
        interpreter = fx.Interpreter(captured.gm)

        def run(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            return interpreter.run(*taken)

        return run

    return lambda gm, inputs: capture(gm, inputs, compile_captured)


def _gpt2() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    import transformers
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=4, attn_pdrop=0.0)
    config.embd_pdrop = config.resid_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                setattr(parent, name, nn.Linear(*child.weight.shape))  # DTensor plans know no Conv1D
    plan = {"mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
    return model, list(model.transformer.h), plan


def _llama() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=4, max_position_embeddings=8, **sizes)
    model = transformers.LlamaForCausalLM(config)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    return model, list(model.model.layers), plan | {n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")}


class _Encoder(nn.Module):
    """Transformer encoder layer with its first and second products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _ViT(nn.Module):
    """Vision transformer on images of 8 x 8 in patches of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16))
        self.layers = nn.ModuleList(_Encoder() for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def _vit() -> tuple[nn.Module, list[nn.Module], dict[str, Any]]:
    model = _ViT()
    return model, list(model.layers), {"up": ColwiseParallel(), "down": RowwiseParallel()}


MODELS = {"gpt2": _gpt2, "llama": _llama, "vit": _vit}
WAYS: dict[str, tuple[int, ...]] = {"fsdp": (4,), "hsdp": (2, 2), "tp": (2,), "tp + fsdp": (2, 2)}


def _shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> nn.Module:
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_one_forward_and_one_backward_graph(name: str, way: str) -> None:
    torch.compiler.reset()
    reset_graph_breaks()
    counts: Counter[str] = Counter()
    shape = WAYS[way]
    world = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
    with fake_ranks(0, world):
        torch.manual_seed(0)
        model, blocks, plan = MODELS[name]()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "inner")[: len(shape)])
        if way.startswith("tp"):
            for block in blocks:
                parallelize_module(block, mesh["inner"] if len(shape) > 1 else mesh, plan)
        if way != "tp":
            _shard(model, blocks, mesh["data"] if way == "tp + fsdp" else mesh)
        run = model if way == "tp" else fully_sharded(model)
        compiled = torch.compile(run, backend=interpreted(counts), fullgraph=True)
        if name == "vit":
            loss = compiled(torch.randn(2, 3, 8, 8)).square().mean()
        else:
            tokens = torch.randint(0, 32, (2, 8))
            loss = F.cross_entropy(compiled(input_ids=tokens, use_cache=False).logits.flatten(0, 1), tokens.flatten())
        loss.backward()
    assert (counts["forward"], counts["backward"], graph_breaks()) == (1, 1, 0)
    if way != "tp":
        assert counts["forward all_gather_into_tensor"]
        assert counts["backward reduce_scatter_tensor"]
    if way == "hsdp":
        assert counts["backward all_reduce"] == counts["backward reduce_scatter_tensor"]
    if way.startswith("tp"):
        assert counts["forward all_reduce"]


class Block(nn.Module):
    """A product, and one that may be recomputed in the backward pass."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.up, self.down, self.recompute = nn.Linear(8, 16), nn.Linear(16, 8), recompute

    def _inner(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return x + self._inner(x)
        options: dict[str, Any] = {}
        if self.recompute == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        return x + checkpoint(self._inner, x, use_reentrant=False, **options)


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Stack(nn.Module):
    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


CASES = ("full checkpointing", "selective checkpointing", "autocast", "a second model", "by block", "inference")


def _run(rank: int, case: str, compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    reset_graph_breaks()
    counts: Counter[str] = Counter()
    backend = interpreted(counts)
    made: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    for seed in range(2 if case == "a second model" else 1):
        torch.manual_seed(seed)
        model = Stack(case.partition(" ")[0] if "checkpointing" in case else "")
        _shard(model, list(model.blocks), init_device_mesh("cpu", (2,)))
        run: Any = model
        if compiled and case == "by block":
            for n, block in enumerate(model.blocks):
                model.blocks[n] = torch.compile(fully_sharded(block), backend=backend, fullgraph=True)
        elif compiled:
            run = torch.compile(fully_sharded(model), backend=backend, fullgraph=True)
        made.append((model, run))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank))
    found: dict[str, Any] = {"outputs": [], "gradients": []}
    for _ in range(2):
        for model, run in made:
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
                y = run.eval()(x) if case == "inference" else run(x)  # type: ignore[attr-defined]
            found["outputs"].append(y.detach().float())
            if case == "inference":
                with torch.no_grad():
                    found["outputs"].append(run(x).float())
            y.float().square().mean().backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found["gradients"].append([g.to_local().clone() for g in gradients if isinstance(g, DTensor)])
    return found | {"counts": counts, "breaks": graph_breaks()}


def _all_cases(rank: int) -> dict[str, Any]:
    return {case: {way: _run(rank, case, way == "compiled") for way in ("eager", "compiled")} for case in CASES}


@pytest.fixture(scope="module")
def composed() -> list[dict[str, Any]]:
    return run_ranks(_all_cases, deadline_s=200)


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_composition_gives_eagers_numbers(composed: list[dict[str, Any]], case: str) -> None:
    tolerance = 2e-2 if case == "autocast" else 1e-5
    for result in composed:
        eager, ours = result[case]["eager"], result[case]["compiled"]
        torch.testing.assert_close(ours["outputs"], eager["outputs"], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours["gradients"], eager["gradients"], atol=tolerance, rtol=tolerance)
        graphs = 2 if case == "by block" else 1  # a second model of the same shapes runs the first one's programs
        counts = ours["counts"]
        assert (counts["forward"], counts["backward"], ours["breaks"]) == (graphs, graphs, 0)
        assert counts["inference"] == (1 if case == "inference" else 0)


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ((0, 2), r"mesh of parameter .* has the ranks \[0, 1, 2, 3\] and the job 2 ranks"),
        ((5, 8), "rank 5 has no part of"),
    ],
    ids=["a smaller job", "a rank outside"],
)
def test_a_mesh_of_another_world_is_refused(then: tuple[int, int], told: str) -> None:
    with fake_ranks(0, 4):
        model = Stack()
        _shard(model, list(model.blocks), init_device_mesh("cpu", (4,)))
    with fake_ranks(*then), pytest.raises(DCompileError, match=told):
        fully_sharded(model)


class _Elsewhere(Shard):
    """A placement of somebody's own."""


def test_a_placement_we_do_not_see_through_is_refused() -> None:
    with fake_ranks(0, 2):
        model = Stack()
        _shard(model, list(model.blocks), init_device_mesh("cpu", (2,)))
        group = model._get_fsdp_state()._fsdp_param_groups[0]
        group.fsdp_params[0].fsdp_placement = _Elsewhere(0)
        with pytest.raises(DCompileError, match=r"parameter head\.weight is placed as .* does not see through"):
            fully_sharded(model)
