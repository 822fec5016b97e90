"""Trains a byte-level GPT on the source code of Python's standard library, data parallel.

    dcompile-launch --nproc 2 examples/train_gpt.py --backend dcompile
    torchrun --nproc-per-node 2 examples/train_gpt.py --backend eager
    dcompile-launch --max-restarts 3 examples/train_gpt.py --checkpoint-dir saved --checkpoint-every 50 --resume
    python examples/train_gpt.py --preset tiny                            # one process, no process group

Runs are reproducible: data depends only on seed, rank and step, so a resumed run sees what the first would have seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

VOCAB = 256
"""Every byte is a token."""


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """Size of the model; ``width`` is a multiple of ``heads``, ``context`` the longest sequence in tokens."""

    layers: int
    width: int
    heads: int
    context: int


PRESETS = {"small": Shape(layers=6, width=384, heads=6, context=256), "tiny": Shape(2, 64, 2, 64)}


class Block(nn.Module):
    """Pre-norm transformer block; maps ``(batch, sequence, width)`` to the same shape."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.head_width, self.dropout = shape.width // shape.heads, dropout
        self.norm_attention = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.merge = nn.Linear(shape.width, shape.width)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.widen = nn.Linear(shape.width, 4 * shape.width)
        self.narrow = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_attention(x)))
        return x + self.drop(self.narrow(F.gelu(self.widen(self.norm_mlp(x)))))

    def attend(self, x: Tensor) -> Tensor:
        # q, k and v of a head lie side by side, so that heads can be spread over ranks (tensor parallel)
        parts = self.qkv(x).unflatten(-1, (-1, 3, self.head_width)).unbind(-2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(mixed.transpose(1, 2).flatten(-2))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """Decoder-only transformer over bytes with learned positions and tied embeddings."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.apply(self._initialise)
        for block in self.blocks:  # keeps the variance of the residual stream independent of the depth (GPT-2)
            for projection in (block.merge, block.narrow):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * shape.layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats of ``targets`` given ``tokens``; both int64 ``(batch, sequence)``."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------- the data


def standard_library() -> Tensor:
    """All Python source files of the running interpreter's standard library, in sorted order, as one uint8 tensor."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch_of(text: Tensor, batch: int, context: int, *, seed: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows of the text and the same windows one byte later, both int64 ``(batch, context)``."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# ------------------------------------------------------------------------------------------------------- the training


Wrap = Callable[[nn.Module, argparse.Namespace, torch.device], nn.Module]


def parse(argv: list[str] | None = None, extend: Callable[..., object] = lambda add: None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backend", choices=("eager", "dcompile", "inductor"), default="dcompile")
    add("--preset", choices=tuple(PRESETS), default="small", help="sizes; the flags below replace single ones")
    for size in ("layers", "width", "heads", "context"):
        add(f"--{size}", type=int)
    add("--dropout", type=float, default=0.0)
    add("--batch", type=int, default=8, help="sequences per rank and step")
    add("--steps", type=int, default=1000, help="number of the last step, counted from the first run")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100, help="steps of linear warm-up; cosine decay to a tenth follows")
    add("--seed", type=int, default=0)
    add("--loss-log", type=Path, help="JSON lines: step, loss averaged over ranks, seconds since the previous line")
    add("--checkpoint-dir", type=Path)
    add("--checkpoint-every", type=int, default=0, help="steps; 0 saves only after the last one")
    add("--checkpoint-async", action="store_true", help="write checkpoints while training goes on")
    add(
        "--resume", action="store_true", help="continue from the newest checkpoint in --checkpoint-dir, if there is one"
    )
    parser.set_defaults(tensor=1)  # ranks that share one copy of the model
    extend(add)
    given = parser.parse_args(argv)
    if given.resume and given.checkpoint_dir is None:
        parser.error("--resume needs --checkpoint-dir")
    return given


def shape_of(given: argparse.Namespace) -> Shape:
    preset = PRESETS[given.preset]
    return Shape(**{name: getattr(given, name) or getattr(preset, name) for name in vars(preset)})


def learning_rate(step: int, given: argparse.Namespace) -> float:
    """Linear warm-up, then cosine decay to a tenth of ``--lr`` at the last step."""
    if step < given.warmup:
        return float(given.lr * (step + 1) / given.warmup)
    done = (step - given.warmup) / max(1, given.steps - given.warmup)
    return float(given.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))))


@contextlib.contextmanager
def ranks() -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of ranks and device; with the environment of a launcher also the default process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield dist.get_rank(), dist.get_world_size(), device
    # Not after an error: the group of a collective that has not ended cannot be destroyed.
    dist.barrier()  # gloo's threads drop their last tensors while this one waits, not while the group is destroyed
    dist.destroy_process_group()


def parallel(model: nn.Module, backend: str, device: torch.device, *, timeline: bool = False) -> nn.Module:
    """The model as it is called in training: data parallel if there are several ranks, compiled by the backend.

    Args:
        timeline: let dcompile record when each step and each collective runs.
    """
    distributed = dist.is_initialized()
    if backend == "dcompile":
        import dcompile

        wrapped = dcompile.data_parallel(model) if distributed else model
        return torch.compile(wrapped, backend="dcompile", options={"timeline": timeline})
    if distributed:
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    else:
        wrapped = model
    return torch.compile(wrapped) if backend == "inductor" else wrapped


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; says where, what room there is, and what is left to resume from."""


class Checkpoints:
    """Model, optimizer, step and random state, saved by all ranks together with torch.distributed.checkpoint.

    The step is the position in the data too. A checkpoint counts once its ``.metadata`` is there, which is written
    last: one that was interrupted is passed over.

    Args:
        background: write while training goes on; only the copy to host memory is waited for. The writers of all ranks
            talk over a process group of their own, because collectives of training are under way meanwhile.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, background: bool) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.background = background and dist.is_initialized()
        self.group = dist.new_group(backend="gloo") if self.background else None
        self.pending: Any = None

    def save(self, step: int) -> None:
        """
        Raises:
            SaveFailed: this save, or the one before it if saves are done in the background.
        """
        self.finish()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "step": step, **random_state()}
        target = self.folder / f"step-{step:08}"
        if self.background:
            self.pending = dcp.async_save(state, checkpoint_id=target, process_group=self.group)
            return
        try:
            dcp.save(state, checkpoint_id=target, no_dist=not dist.is_initialized())
        except (Exception, dcp.CheckpointException) as error:
            raise self._failed() from error

    def finish(self) -> None:
        """Wait for a save in the background."""
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                pending.result()
            except (Exception, dcp.CheckpointException) as error:
                raise self._failed() from error

    def _failed(self) -> SaveFailed:
        free, last = shutil.disk_usage(self.folder).free, (self.complete() or [None])[-1]
        have = f"the last complete one is {last.name}" if last else "there is no complete one"
        return SaveFailed(f"cannot save a checkpoint in {self.folder}, with {free / 1e6:,.0f} MB free there; {have}")

    def complete(self) -> list[Path]:
        """Folders of all complete checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob("step-*/.metadata"))

    def load(self) -> int:
        """Restores the newest complete checkpoint; returns its step, 0 if there is none."""
        found = self.complete()
        if not found:
            return 0
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
        saved = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
        state |= {name: value for name, value in random_state().items() if name in saved}  # not of ranks that are new
        dcp.load(state, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_random_state(state)
        return int(state["step"])


def random_state() -> dict[str, Tensor]:
    """The generators' states under names that differ between ranks: every rank saves and loads its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    for name in random_state().keys() & state.keys():
        (torch.cuda.set_rng_state if ".cuda." in name else torch.set_rng_state)(state[name])


class Stop:
    """Asked to leave: a scheduler that wants its machine back sends SIGTERM some time before SIGKILL.

    The signal reaches ranks at different steps. ``requested`` travels with the loss, so all leave after the same one.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def over_ranks(loss: Tensor, stop: bool, world: int) -> tuple[float, bool]:
    """The mean loss, and whether any rank has been asked to stop."""
    total = torch.stack((loss.detach().float(), torch.full_like(loss, float(stop), dtype=torch.float32)))
    if world > 1:
        dist.all_reduce(total)
    mean, stops = total.tolist()
    return mean / world, stops > 0


def log_from(path: Path, first: int) -> TextIO:
    """The loss log, without the steps after ``first``, which a resumed run repeats."""
    lines = path.read_text().splitlines() if first and path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= first]
    path.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a")


def compile_stage() -> str:
    """What dcompile is doing at this moment, "" if it is not compiling or not in use."""
    used = sys.modules.get("dcompile")
    return used.counters().stage if used else ""


class StageColumn(ProgressColumn):
    """The compile stage, while there is one."""

    def render(self, task: Task) -> Text:
        return Text(compile_stage(), style="cyan")


class Display:
    """Progress on rank 0: a bar in a terminal, plain lines elsewhere; other ranks are silent."""

    LINES = 20
    """Lines a run prints at most when standard output is not a terminal, beside the first steps."""

    def __init__(self, rank: int, first: int, steps: int, tokens_per_step: int) -> None:
        self.shown, self.steps, self.tokens_per_step = rank == 0, steps, tokens_per_step
        self.console = Console(highlight=False)
        self.every = math.ceil((steps - first) / self.LINES) or 1
        self.first = first
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            StageColumn(),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not (self.shown and self.console.is_terminal),
        )
        self.task = self.bar.add_task("compiling", total=steps, completed=first)

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, soft_wrap=True)

    def step(self, step: int, loss: float, seconds: float) -> None:
        line = f"step {step:>5}  loss {loss:.4f}  {self.tokens_per_step / seconds:>9,.0f} tokens/s"
        if step == self.first + 1:
            line += "  (compiles)"
        self.bar.update(self.task, completed=step, description=line)
        if self.bar.disable and (step in (self.first + 1, self.first + 2, self.steps) or step % self.every == 0):
            self.say(line)


def compile_stages(backend: str) -> str:
    """What compiling took, stage by stage, the longest first."""
    if backend != "dcompile":
        return "compiled" if backend != "eager" else "not compiled"
    import dcompile

    counted = dcompile.counters()
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in counted.seconds.most_common())
    cached = f" ({counted.cache_hits} from the cache)" if counted.cache_hits else ""
    return f"compiled {counted.graphs} graphs{cached} with {counted.kernels} kernels: {stages}"


def communication_hidden(backend: str) -> str:
    """How much of the communication ran under compute, in words."""
    if backend != "dcompile" or not dist.is_initialized():
        return "communication hidden: not measured"
    import dcompile

    summary = dcompile.communication_summary()
    if summary is None:
        return "communication hidden: not measured"
    return (
        f"communication hidden: {summary.hidden_share:.0%} of {summary.total_us / 1e3:.1f} ms, "
        f"{summary.exposed_us / 1e3:.1f} ms exposed (the last {summary.calls} calls of compiled graphs on rank 0)"
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters by the device mesh they are spread over: one fused update takes tensors of one mesh."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def train(given: argparse.Namespace, rank: int, world: int, device: torch.device, wrap: Wrap) -> int:
    """Returns the exit code.

    Args:
        wrap: makes of the model, the command line and the device what is called in training.
    """
    shape = shape_of(given)
    torch.manual_seed(given.seed)
    model = GPT(shape, given.dropout).to(device)
    called = wrap(model, given, device)
    readers = world // given.tensor
    reader = rank // given.tensor
    torch.manual_seed(given.seed + 1 + reader)  # dropout differs between ranks that see different data
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=given.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    folder = given.checkpoint_dir
    checkpoints = Checkpoints(folder, model, optimizer, given.checkpoint_async) if folder else None
    first = checkpoints.load() if checkpoints and given.resume else 0
    stop, stopped = Stop(), False
    text = standard_library()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with (
        Display(rank, first, given.steps, given.batch * shape.context * readers) as display,
        contextlib.ExitStack() as files,
    ):
        display.say(
            f"{given.backend}: {parameters / 1e6:.1f} M parameters, {world} rank{'s' * (world > 1)} on {device.type}, "
            f"{len(text) / 1e6:.0f} MB of text, {'resumed at' if first else 'from'} step {first}"
        )
        log = files.enter_context(log_from(given.loss_log, first)) if given.loss_log and rank == 0 else None
        for step in range(first, given.steps):
            began = time.perf_counter()
            batch = batch_of(text, given.batch, shape.context, seed=given.seed, rank=reader, step=step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, given)
            loss = called(*(part.to(device) for part in batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean, stopped = over_ranks(loss, stop.requested, world)
            seconds = time.perf_counter() - began
            if step == first:
                display.say(compile_stages(given.backend))
            display.step(step + 1, mean, seconds)
            if log:
                print(json.dumps({"step": step + 1, "loss": mean, "seconds": seconds}), file=log, flush=True)
            last = stopped or step + 1 == given.steps
            if checkpoints and (last or (given.checkpoint_every and (step + 1) % given.checkpoint_every == 0)):
                checkpoints.save(step + 1)
            if stopped:
                break
        if checkpoints:
            checkpoints.finish()
        display.say(communication_hidden(given.backend))
        if stopped:
            display.say(f"asked to stop after step {step + 1}" + (", which is saved" if checkpoints else ""))
            return Stop.EXIT_CODE
    return 0


def every_rank_a_copy(model: nn.Module, given: argparse.Namespace, device: torch.device) -> nn.Module:
    """How this script itself uses its ranks."""
    return parallel(model, given.backend, device, timeline=True)


def main(
    argv: list[str] | None = None, wrap: Wrap = every_rank_a_copy, extend: Callable[..., object] = lambda add: None
) -> int:
    """Runs the command line.

    Args:
        wrap: see ``train``.
        extend: adds arguments; called with the parser's ``add_argument``.
    """
    given = parse(argv, extend)
    with ranks() as (rank, world, device):
        if world % given.tensor:
            raise SystemExit(f"--tensor {given.tensor} does not divide the {world} ranks")
        return train(given, rank, world, device, wrap)


if __name__ == "__main__":
    sys.exit(main())
