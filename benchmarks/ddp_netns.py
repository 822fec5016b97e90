"""Data parallel training over an honest 1 Gb/s network on one machine: eager DDP, DDP with Inductor, and dcompile.

    sudo python benchmarks/ddp_netns.py

Makes two network namespaces joined by a veth pair whose both ends are held to a rate (``tc ... tbf``), runs one rank in
each, and removes them again. Needs root and iproute2. ``dcompile no overlap`` is dcompile with
``DCOMPILE_SKIP=overlap``; the exposed share is the time the program stood still for communication, of all
communication, from its own timeline.
Writes ``benchmarks/results/<date>-ddp_netns.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "benchmarks")]

import torch.distributed as dist
from ddp_cpu import SETTLING_STEPS, model_flags, surroundings, train

import dcompile
from examples.train_gpt import PRESETS, shape_of

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "eager": ("eager", {}),
    "inductor": ("inductor", {}),
    "dcompile": ("dcompile", {}),
    "dcompile no overlap": ("dcompile", {"DCOMPILE_SKIP": "overlap"}),
    "dcompile, timed": ("dcompile", {"DCOMPILE_TIMELINE": "1"}),
    "dcompile no overlap, timed": ("dcompile", {"DCOMPILE_SKIP": "overlap", "DCOMPILE_TIMELINE": "1"}),
}
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29577
JOB_LIMIT_S = 600


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    add("--rate", default="1gbit", help="of each end of the link, as tc writes it")
    add("--preset", choices=tuple(PRESETS), default="small")
    for size in ("layers", "width", "heads", "context"):
        add(f"--{size}", type=int)
    add("--batch", type=int, default=4, help="sequences per rank and step")
    add("--steps", type=int, default=12)
    add("--results", type=Path, default=ROOT / "benchmarks" / "results")
    add("--worker", nargs=2, metavar=("BACKEND", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    given.context = given.context or min(128, PRESETS[given.preset].context)
    return given


def work(given: argparse.Namespace) -> None:
    """One rank: trains; rank 0 writes the seconds of each step, the losses and the exposed share of communication."""
    backend, file = given.worker
    dist.init_process_group("gloo")
    if backend == "dcompile":
        dcompile.calibrate()
    found = train(given, backend, timeline=bool(os.environ.get("DCOMPILE_TIMELINE")))
    summary = dcompile.communication_summary()
    found["exposed_share"] = 1.0 - summary.hidden_share if summary is not None else None
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


def call(command: str, check: bool = True) -> None:
    subprocess.run(shlex.split(command), check=check, capture_output=not check)


@contextlib.contextmanager
def network(rate: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two namespaces and the interface in each, joined by a link of ``rate``; gone afterwards."""
    spaces = (f"dcompile{os.getpid()}a", f"dcompile{os.getpid()}b")
    ends = (f"dc{os.getpid()}a", f"dc{os.getpid()}b")
    try:
        for space in spaces:
            call(f"ip netns add {space}")
        call(f"ip link add {ends[0]} netns {spaces[0]} type veth peer name {ends[1]} netns {spaces[1]}")
        for space, end, address in zip(spaces, ends, ADDRESSES, strict=True):
            call(f"ip -n {space} addr add {address}/24 dev {end}")
            call(f"ip -n {space} link set lo up")
            call(f"ip -n {space} link set {end} up")
            call(f"tc -n {space} qdisc add dev {end} root tbf rate {rate} burst 256kb latency 50ms")
        yield spaces, ends
    finally:
        for space in spaces:
            call(f"ip netns del {space}", check=False)


def measure(given: argparse.Namespace, variant: str, spaces: tuple[str, str], ends: tuple[str, str]) -> dict[str, Any]:
    """One job of fresh processes.

    Raises:
        RuntimeError: a rank failed or took too long; carries the end of its standard error.
    """
    backend, extra = VARIANTS[variant]
    with tempfile.TemporaryDirectory(prefix="ddp_netns-") as folder:
        file = Path(folder) / "measured.json"
        ranks = []
        for rank, (space, end) in enumerate(zip(spaces, ends, strict=True)):
            environment = {
                **os.environ,
                **extra,
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": end,
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{rank}",
                "DCOMPILE_CACHE_DIR": f"{folder}/dcompile{rank}",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
            }
            command = ["ip", "netns", "exec", space, sys.executable, str(Path(__file__).resolve())]
            command += ["--worker", backend, str(file), *model_flags(given)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        try:
            errors = [rank.communicate(timeout=JOB_LIMIT_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(f"{variant}:\n" + "\n".join(error.decode()[-4000:] for error in errors))
        found: dict[str, Any] = json.loads(file.read_text())
    later = found["seconds"][1 + SETTLING_STEPS :]
    found["step_ms"], found["fastest_step_ms"] = statistics.median(later) * 1e3, min(later) * 1e3
    return found


def write(given: argparse.Namespace, found: dict[str, Any], argv: list[str] | None) -> None:
    """What was measured so far."""
    today = datetime.date.today().isoformat()
    record = {
        "date": today,
        "command": shlex.join(["python", "benchmarks/ddp_netns.py", *(sys.argv[1:] if argv is None else argv)]),
        **surroundings(),
        "rate": given.rate,
        "shape": vars(shape_of(given)),
        "batch": given.batch,
        "measurements": found,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / f"{today}-ddp_netns.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.worker:
        work(given)
        return 0
    found: dict[str, Any] = {}
    with network(given.rate) as (spaces, ends):
        for variant in given.variants:
            found[variant] = one = measure(given, variant, spaces, ends)
            exposed = "" if one["exposed_share"] is None else f"  exposed {one['exposed_share']:.0%}"
            times = f"step {one['step_ms']:8.1f} ms  fastest {one['fastest_step_ms']:8.1f} ms"
            print(f"{variant:28} {times}{exposed}", flush=True)
            write(given, found, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
