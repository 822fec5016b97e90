"""How long scheduling takes on large graphs: bucketing and overlap of a backward pass, seconds by size.

    python benchmarks/schedule_scale.py

The graph is a chain of layers. Each computes a gradient of its input, from it the gradients of its parameters, and
launches an all-reduce for each. Needs no ranks and no device. Writes ``benchmarks/results/<date>-schedule_scale.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.collectives.group import Group
from dcompile.collectives.nodes import Kind, Pending, Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern, Node, Ref
from dcompile.ir.types import DType, Value, contiguous_stride
from dcompile.options import Options
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.overlap import overlap, predict

SIZES = ((2_000, 100), (10_000, 500), (36_000, 1_800))
"""(nodes, collectives)."""

LIMITS_S = {10_000: 1.0, 36_000: 5.0}
SHAPE = (512, 512)


@dataclass(frozen=True)
class Row:
    """Seconds of each part for one size."""

    nodes: int
    collectives: int
    bucket_s: float
    overlap_s: float
    predict_s: float


def backward(nodes: int, collectives: int) -> Graph:
    """A backward pass of about ``nodes`` nodes with ``collectives`` all-reduces."""
    made: list[Node] = []
    outputs: list[Ref] = []

    def value(name: str) -> Value:
        return Value(name, DType.F32, SHAPE, contiguous_stride(SHAPE))

    def call(name: str, *operands: str) -> str:
        made.append(
            Extern(outs=(value(name),), op="aten.mm.default", args=tuple(map(Ref, operands)), out_op="aten.mm.out")
        )
        return name

    work = nodes // collectives - 3  # beside the gradient's own product, the launch and the wait
    current = "x"
    for layer in range(collectives):
        for n in range(work):
            current = call(f"dx{layer}_{n}", current, "w")
        gradient = call(f"dw{layer}", current, "x")
        result = value(f"g{layer}")
        pending = Pending(f"p{layer}", (result,), in_place=False)
        made.append(
            Start(pending=pending, kind=Kind.ALL_REDUCE, group=Group("g0", 8), sources=(gradient,), reduction="sum")
        )
        made.append(Wait(outs=(result,), pending=pending.name))
        outputs.append(Ref(result.name))
    return Graph("backward", (value("x"), value("w")), tuple(made), tuple(outputs)).check()


def timed(graph: Graph, run: Callable[[Graph, Context], Graph], ctx: Context) -> tuple[Graph, float]:
    began = time.perf_counter()
    found = run(graph, ctx)
    return found, time.perf_counter() - began


def measure(nodes: int, collectives: int) -> Row:
    graph = backward(nodes, collectives)
    ctx = Context(Options(), CostModel.analytical("cuda", 8))
    bucketed, bucket_s = timed(graph, bucket_collectives, ctx)
    ordered, overlap_s = timed(bucketed, overlap, ctx)
    began = time.perf_counter()
    predict(ordered, ctx, bucketed)
    return Row(len(graph.nodes), collectives, bucket_s, overlap_s, time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="show where the time of the largest size goes")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.profile:
        import cProfile

        cProfile.run(f"measure{SIZES[-1]}", sort="tottime")
        return 0
    rows = [measure(*size) for size in SIZES]
    for row in rows:
        total = row.bucket_s + row.overlap_s + row.predict_s
        limit = LIMITS_S.get(row.nodes // 1000 * 1000)
        print(json.dumps(row.__dict__ | {"total_s": round(total, 3), "limit_s": limit}))
    text = json.dumps({"machine": platform.platform(), "rows": [row.__dict__ for row in rows]}, indent=1)
    options.results.mkdir(exist_ok=True)
    (options.results / f"{date.today()}-schedule_scale.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
