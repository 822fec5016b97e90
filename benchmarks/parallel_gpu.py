"""One training step of a Llama-like model over several GPUs: data parallel and fully sharded, every backend in one run.

    PYTHONPATH=.:launch python benchmarks/parallel_gpu.py [--models 125M 1.1B] [--links fast slow] [--ways ...]

fp32 parameters, bf16 compute, fused AdamW, one process a GPU. ``fast`` is the link as it is, ``slow`` the same GPUs
with ``NCCL_P2P_DISABLE=1``, through host memory, which stands for a network. ``floor`` is the same model compiled by
Inductor (``floor ours``: by dcompile) without any exchange of gradients: the price of communication is the step minus
the floor. Each way starts from the same weights and sees the same data; its losses are compared with eager DDP's. With
``--cpu`` it runs two gloo ranks on the CPU, to try the script.

    ... --models tp4096 --ways tp "tp inductor" "tp inductor async" "tp ours whole" "tp ours"

are layers of width 4096 in bf16, tensor parallel over all GPUs, activations between them sharded along the sequence:
eager DTensor, Inductor without and with its own pipelined products, dcompile without and with async_matmuls.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import queue
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "benchmarks")]

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_models import Language, Layer, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dcompile
from dcompile.analyse.calibration import Calibration

WARMUP, PARTS, DEADLINE_S = 6, 4, 540


@dataclass(frozen=True)
class Size:
    """Sizes of a model and its batch for each rank."""

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    batch: int
    context: int

    def make(self) -> nn.Module:
        return Language("llama", self.layers, self.width, self.heads, self.hidden, self.vocabulary, self.context)

    def data(self, device: str) -> tuple[torch.Tensor, ...]:
        return tokens(self.batch, self.context, self.vocabulary)(device)


class Stack(nn.Module):
    """Layers alone; the mean square of what comes out."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, hidden, "llama") for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


@dataclass(frozen=True)
class TensorParallel(Size):
    """A stack of layers, each spread over all ranks; ``context`` is the whole sequence."""

    def make(self) -> nn.Module:
        return Stack(self.layers, self.width, self.heads, self.hidden).bfloat16()

    def data(self, device: str) -> tuple[torch.Tensor, ...]:
        shape = (self.batch, self.context // dist.get_world_size(), self.width)
        return (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True),)


SIZES = {
    "125M": Size(12, 768, 12, 2048, 32000, 8, 1024),
    "1.1B": Size(20, 2048, 16, 5632, 32000, 4, 1024),
    "tiny": Size(2, 64, 2, 128, 256, 2, 32),
    "tp4096": TensorParallel(4, 4096, 32, 11264, 0, 4, 2048),
    "tp-tiny": TensorParallel(2, 64, 4, 128, 0, 4, 32),
}


def sharded(model: nn.Module) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def per_block(model: nn.Module) -> nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile()
    return sharded(model)


def distributed(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def ours(model: nn.Module) -> nn.Module:
    return dcompile.compile(model, deadline_s=120.0)


def spread(model: nn.Module) -> nn.Module:
    """Heads and hidden units over all ranks, the sequence in between. A rank's slice of qkv holds its own heads."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    column, row = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    plan = {
        "norm1": SequenceParallel(),
        "norm2": SequenceParallel(),
        "attention.qkv": column,
        "attention.out": row,
        "mlp.gate": column,
        "mlp.up": column,
        "mlp.down": row,
    }
    for layer in model.layers:  # type: ignore[union-attr]
        layer.attention.heads //= ranks
        parallelize_module(layer, mesh, plan)
    return model


def pipelined(model: nn.Module) -> nn.Module:
    """Inductor's own async tensor parallelism, over symmetric memory."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    return torch.compile(spread(model))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "floor": torch.compile,
    "floor ours": ours,
    "ddp": distributed,
    "ddp inductor": lambda model: torch.compile(distributed(model)),
    "ddp ours": lambda model: ours(dcompile.data_parallel(model)),
    "fsdp": sharded,
    "fsdp inductor": per_block,
    "fsdp ours": lambda model: ours(sharded(model)),
    "tp": spread,
    "tp inductor": lambda model: torch.compile(spread(model)),
    "tp ours whole": lambda model: dcompile.compile(spread(model), deadline_s=120.0, skip={"async_matmuls"}),
    "tp ours": lambda model: ours(spread(model)),
    "tp inductor async": pipelined,
}


def measure(size: Size, way: str, rank: int, device: torch.device, steps: int) -> dict[str, Any]:
    """First step, median step, peak memory and losses of one way."""
    torch.compiler.reset()
    dcompile.reset_counters()
    torch.manual_seed(0)
    model = size.make().to(device)
    run = WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    torch.manual_seed(1 + rank)
    data = size.data(str(device))
    plain = not way.startswith(("fsdp", "tp"))
    autocast = torch.autocast(device.type, torch.bfloat16) if plain else contextlib.nullcontext()

    def step(between: Callable[[], object] = lambda: None) -> torch.Tensor:
        with autocast:
            loss = run(*data)
        between()
        loss.backward()
        between()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        between()
        return loss.detach()

    began = time.perf_counter()
    losses = [step().item()]
    first_s = time.perf_counter() - began
    for _ in range(WARMUP):
        losses.append(step().item())
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step().item())
        times.append(1e3 * (time.perf_counter() - began))
    parts = [parts_of_a_step(step, device) for _ in range(PARTS)]
    counters = dcompile.counters()
    return {
        "parts_ms": [round(statistics.median(column), 2) for column in zip(*parts, strict=True)],
        "first_s": round(first_s, 2),
        "step_ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "losses": losses,
        "graphs": counters.graphs,
        "collectives": counters.collectives,
        "compile_s": {name: round(s, 2) for name, s in counters.seconds.most_common(6)} if "ours" in way else None,
    }


def parts_of_a_step(step: Callable[..., torch.Tensor], device: torch.device) -> list[float]:
    """Milliseconds of forward, backward and optimizer, each waited for."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    step(mark)
    return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]


def rank_main(rank: int, world: int, link: str, port: int, given: argparse.Namespace, out: Any) -> None:
    if link == "slow":
        os.environ["NCCL_P2P_DISABLE"] = "1"
    os.environ["DCOMPILE_CACHE_DIR"] = tempfile.mkdtemp(
        prefix=f"dcompile-{link}-"
    )  # prices of this link, cold compiles
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu") if given.cpu else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo" if given.cpu else "nccl", timeout=datetime.timedelta(seconds=150))
    if any("ours" in way for way in given.ways):
        began = time.perf_counter()
        measured = dcompile.calibrate()
        if rank == 0:
            print(
                f"{link:5} calibrated in {time.perf_counter() - began:.1f} s", *prices(measured), sep="\n", flush=True
            )
    found: dict[str, dict[str, Any]] = {}
    for model in given.models:
        found[model] = {}
        for way in given.ways:
            if way.startswith("tp") != model.startswith("tp"):
                continue
            try:
                result = measure(SIZES[model], way, rank, device, given.steps)
            except Exception:
                result = {"error": traceback.format_exc()[-3000:]}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            found[model][way] = result
            if rank == 0 or "error" in result:
                print(f"rank {rank}: " * ("error" in result) + row(link, model, way, found[model]), flush=True)
            if rank == 0:
                out.put(found)
            if "error" in result:
                time.sleep(5)  # the other ranks say what they met, too
                os._exit(3)  # the other rank may hang in a collective: the next link starts afresh
    dist.barrier()
    dist.destroy_process_group()


def prices(measured: Calibration) -> Iterator[str]:
    """A line for each lowering and kind: microseconds by payload, and the share of it that compute beside it loses."""
    lowerings = {"library": measured, **{via.value: found for via, found in measured.others.items()}}
    for name, found in lowerings.items():
        for kind, points in found.curves.items():
            times = "  ".join(f"{size >> 10} KiB {us:.0f}" for size, us in points)
            yield f"    {name:9} {kind.value:15} {times}"
        yield f"    {name:9} contention {found.contention:.2f}"


def row(link: str, model: str, way: str, found: dict[str, Any]) -> str:
    result = found[way]
    if "error" in result:
        return f"{link:5} {model:5} {way:14} failed: {result['error']}"
    reference = found.get("tp" if way.startswith("tp") else "ddp", result)["losses"]
    apart = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], reference, strict=True))
    return (
        f"{link:5} {model:5} {way:14} step {result['step_ms']:8.2f} ms  fastest {result['fastest_ms']:8.2f}  "
        f"first {result['first_s']:6.2f} s  peak {result['peak_gib']} GiB  losses apart {apart:.1e}  "
        f"collectives {result['collectives']}  parts {result['parts_ms']}"
    )


def run_link(link: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What rank 0 has measured so far, each time it has measured one more."""
    world = 2 if given.cpu else torch.cuda.device_count()
    port = 29500 + os.getpid() % 1000 + (link == "slow")
    # Prices are kept by topology, which does not know how the link was changed; and compiles are cold.
    os.environ["DCOMPILE_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"dcompile-{link}-")
    context = mp.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=rank_main, args=(rank, world, link, port, given, out)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + given.limit_s
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            yield out.get(timeout=0.2)
        if any(p.exitcode not in (None, 0) for p in processes):
            break
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def hardware(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    yield "date", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    yield "command", " ".join(["python", "benchmarks/parallel_gpu.py", *sys.argv[1:]])
    yield "torch", torch.__version__
    yield "gpus", [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if not given.cpu else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=["125M", "1.1B"])
    parser.add_argument("--links", nargs="+", choices=("fast", "slow"), default=["fast", "slow"])
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=DEADLINE_S, help="seconds until one link's ranks are killed")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    given = parser.parse_args()
    result = dict(hardware(given))
    for link in given.links:
        for found in run_link(link, given):
            result[link] = found
            if given.out:
                (given.out / f"{result['date'][:10]}-parallel_gpu.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
