"""How long scheduling takes on large graphs: bucketing and overlap of a backward pass, seconds by size.

    python benchmarks/schedule_scale.py

The graph is a chain of layers. Each computes a gradient of its input, from it the gradients of its parameters, and
launches an all-reduce for each. Times are those of the processor. Each size is scheduled with buckets of the chosen
size, and with every collective on its own, which leaves all of them to the overlap pass. Needs no ranks and no device.
Returns an error if a size takes longer than its limit. Writes ``benchmarks/results/<date>-schedule_scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
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
from dcompile.watch import collector_rests

SIZES = ((2_000, 100), (10_000, 500), (36_000, 1_800))
"""(nodes, collectives)."""

LIMITS_S = {10_000: 1.0, 36_000: 5.0}
SHAPE = (512, 512)


@dataclass(frozen=True)
class Row:
    """CPU seconds of each part for one size."""

    nodes: int
    collectives: int
    buckets: str
    bucket_s: float
    overlap_s: float
    predict_s: float

    @property
    def total_s(self) -> float:
        return round(self.bucket_s + self.overlap_s + self.predict_s, 3)


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
    began = time.process_time()
    with collector_rests():  # as in the pipeline
        found = run(graph, ctx)
    return found, time.process_time() - began


def measure(nodes: int, collectives: int, bucket_bytes: int | None) -> Row:
    graph = backward(nodes, collectives)
    ctx = Context(Options(bucket_bytes=bucket_bytes), CostModel.analytical("cuda", 8))
    bucketed, bucket_s = timed(graph, bucket_collectives, ctx)
    ordered, overlap_s = timed(bucketed, overlap, ctx)
    _, predict_s = timed(ordered, lambda last, ctx: (predict(last, ctx, bucketed), last)[1], ctx)
    buckets = "chosen" if bucket_bytes is None else "none"
    return Row(len(graph.nodes), collectives, buckets, bucket_s, overlap_s, predict_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="show where the time of the largest size goes")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    if options.profile:
        import cProfile

        cProfile.run(f"measure({SIZES[-1][0]}, {SIZES[-1][1]}, None)", sort="tottime")
        return 0
    rows = []
    for bucket_bytes in (None, 1):
        for size in SIZES:
            row = measure(*size, bucket_bytes)
            rows.append(row.__dict__ | {"total_s": row.total_s, "limit_s": LIMITS_S.get(size[0])})
            print(json.dumps(rows[-1]), flush=True)
    facts = {"command": "python benchmarks/schedule_scale.py", "machine": platform.platform()}
    facts |= {"python": platform.python_version(), "load_before": load_before}
    options.results.mkdir(exist_ok=True)
    text = json.dumps({**facts, "rows": rows}, indent=1)
    (options.results / f"{date.today()}-schedule_scale.json").write_text(text + "\n")
    return int(any(row["limit_s"] and row["total_s"] > row["limit_s"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
