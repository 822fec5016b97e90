"""``dcompile simulate``: compile a training script as one of many ranks, and predict its step from the cost model.

    dcompile simulate --ranks 4096 --topology cluster.toml train.py --steps 1

The script runs for real in one process, with a process group that has no peers. What ``docs/simulation.md`` says holds.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dcompile.analyse.topology import read_topology
from dcompile.backend import observing
from dcompile.errors import DCompileError
from dcompile.ir.graph import Graph, hint
from dcompile.ir.types import Value
from dcompile.pipeline import Built
from dcompile.runtime.fake_ranks import fake_ranks


@dataclass(frozen=True)
class GraphForecast:
    """One compiled graph, for one rank.

    Attributes:
        step_us: predicted time from its first to its last step.
        compute_us: ``step_us`` without ``exposed_us``: kernels, library calls and launches, as slow as transfers beside
            them make them.
        communication_us: time of all collectives, one after another.
        exposed_us: time the program stands still for collectives.
        program_order_us: ``step_us`` in the order the program was written in.
        lower_bound_us: no order is faster under the same prices.
        collectives: number of them.
        input_bytes: tensors that exist when it is called: parameters, data, what the forward pass saved.
        peak_bytes: most bytes in use beyond these.
    """

    name: str
    step_us: float
    compute_us: float
    communication_us: float
    exposed_us: float
    program_order_us: float
    lower_bound_us: float
    collectives: int
    input_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Forecast:
    """A step on one of ``ranks`` ranks: its forward graphs, then its backward graphs.

    Attributes:
        optimizer_bytes: state of all optimizers that the script made, after its last step.
        eager: graphs that were not compiled and so have no price.
    """

    ranks: int
    topology: str
    graphs: tuple[GraphForecast, ...]
    optimizer_bytes: int
    eager: tuple[str, ...] = ()

    @property
    def step_us(self) -> float:
        return sum(graph.step_us for graph in self.graphs)

    @property
    def exposed_us(self) -> float:
        return sum(graph.exposed_us for graph in self.graphs)

    @property
    def memory_bytes(self) -> int:
        """Most bytes of a rank: the fullest graph, and the optimizers' state."""
        return max((g.input_bytes + g.peak_bytes for g in self.graphs), default=0) + self.optimizer_bytes

    def __str__(self) -> str:
        head = f"{'graph':<14}{'step ms':>10}{'compute':>10}{'comm.':>10}{'exposed':>10}{'written':>10}{'MB':>10}"
        lines = [f"{self.ranks} ranks on {self.topology}; milliseconds and megabytes of one rank", head]
        for g in self.graphs:
            times = (g.step_us, g.compute_us, g.communication_us, g.exposed_us, g.program_order_us)
            megabytes = (g.input_bytes + g.peak_bytes) / 1e6
            lines.append(f"{g.name:<14}" + "".join(f"{us / 1e3:>10.3f}" for us in times) + f"{megabytes:>10.1f}")
        share = self.exposed_us / self.step_us if self.step_us else 0.0
        lines += [
            f"step {self.step_us / 1e3:.3f} ms, {share:.1%} of it exposed communication; memory "
            f"{self.memory_bytes / 1e6:.1f} MB, of it {self.optimizer_bytes / 1e6:.1f} MB optimizer state",
            "not priced: the optimizer's step, data loading, and eager code between the graphs",
        ]
        lines += [f"not compiled, not priced: {name}" for name in self.eager]
        return "\n".join(lines)


def forecast_graph(built: Built) -> GraphForecast | None:
    """What the plan of a graph predicts; None for a graph that runs op by op."""
    plan = built.plan
    if plan is None or plan.prediction is None:
        return None
    found = plan.prediction
    communication_us = sum(i.end_us - i.start_us for i in found.intervals if i.lane != "compute")
    exposed_us = sum(exposure.exposed_us for exposure in found.exposures)
    return GraphForecast(
        built.name,
        found.makespan_us,
        found.makespan_us - exposed_us,
        communication_us,
        exposed_us,
        found.program_order_us,
        found.lower_bound_us,
        len(found.exposures),
        _bytes(plan.graph),
        plan.peak_bytes,
    )


def _bytes(graph: Graph) -> int:
    """Of the inputs at the size hints."""
    return sum(hint(item.nbytes, graph.size_hints) for item in graph.inputs if isinstance(item, Value))


def simulate(script: Path, args: Sequence[str], ranks: int, topology: Path, rank: int = 0) -> Forecast:
    """Run ``script`` as ``rank`` of ``ranks`` ranks and forecast a step of what it compiles with dcompile.

    Raises:
        DCompileError: the topology cannot be read or does not join these ranks, or nothing was compiled.
    """
    seen: list[Built] = []
    optimizers: list[torch.optim.Optimizer] = []
    made: Any = torch.optim.Optimizer.__init__

    def remember(optimizer: torch.optim.Optimizer, *given: Any, **more: Any) -> None:
        made(optimizer, *given, **more)
        optimizers.append(optimizer)

    before = sys.argv, sys.path[0]
    torch.optim.Optimizer.__init__ = remember  # type: ignore[method-assign, assignment]
    try:
        with fake_ranks(rank, ranks), observing(seen.append):
            os.environ["DCOMPILE_TOPOLOGY"] = str(topology.absolute())
            sys.argv, sys.path[0] = [str(script), *args], str(script.resolve().parent)
            _run(script)
            kept = sum(_state_bytes(optimizer) for optimizer in optimizers)
    finally:
        torch.optim.Optimizer.__init__ = made  # type: ignore[method-assign]
        sys.argv, sys.path[0] = before
    if not seen:
        raise DCompileError(f"{script} compiled nothing with dcompile")
    forecasts = {built.name: forecast_graph(built) for built in seen}
    graphs = tuple(found for found in forecasts.values() if found is not None)
    eager = tuple(name for name, found in forecasts.items() if found is None)
    return Forecast(ranks, read_topology(topology).name, graphs, kept, eager)


def _run(script: Path) -> None:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``dcompile``."""
    parser = argparse.ArgumentParser("dcompile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = commands.add_parser("simulate", help="predict a training step on many ranks")
    chosen.add_argument("--ranks", type=int, required=True, help="ranks of the job")
    chosen.add_argument("--rank", type=int, default=0, help="which of them to be (default 0)")
    chosen.add_argument(
        "--topology", type=Path, required=True, help="TOML file with the prices of processors and links"
    )
    chosen.add_argument("--json", action="store_true", help="print the forecast as JSON")
    chosen.add_argument("script", type=Path, help="training script that compiles with dcompile; a step or two will do")
    chosen.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    given = parser.parse_args(argv)
    if not 0 <= given.rank < given.ranks:
        parser.error(f"--rank {given.rank} is not among {given.ranks} ranks")
    if not given.script.is_file():
        parser.error(f"no such script: {given.script}")
    try:
        found = simulate(given.script, given.args, given.ranks, given.topology, given.rank)
    except DCompileError as error:
        sys.stderr.write(f"dcompile simulate: {error}\n")
        return 1
    sys.stdout.write((json.dumps(asdict(found), indent=1) if given.json else str(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
