"""One rank of ``dcompile-launch`` that is to be placed: takes its cores and its GPU, then runs the script.

python -m dcompile_launch.rank PIN SCRIPT ARGS...
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

NODES = Path("/sys/devices/system/node")
PINS = ("auto", "cores", "none")


def cores_of(text: str) -> list[int]:
    """The numbers of a Linux core list: ``"0-2,8"`` is 0, 1, 2, 8."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


def memory_nodes(allowed: Sequence[int], folder: Path = NODES) -> list[list[int]]:
    """The allowed cores of each NUMA node that has any; one list with all of them where the system does not say."""
    lists = [path.read_text() for path in sorted(folder.glob("node[0-9]*/cpulist"), key=_number)]
    nodes = [[core for core in cores_of(text) if core in set(allowed)] for text in lists]
    return [node for node in nodes if node] or [sorted(allowed)]


def _number(path: Path) -> int:
    return int(path.parent.name.removeprefix("node"))


def share(pin: str, rank: int, ranks: int, nodes: Sequence[Sequence[int]]) -> list[int] | None:
    """The cores of local rank ``rank`` among ``ranks``; None to stay where it is.

    ``cores``: an equal share of all cores, neighbours together. ``auto``: all cores of one NUMA node, ranks dealt to
    nodes in order, if there are several nodes and no more nodes than ranks; memory is then near, and threads of the
    communication library may still move.
    """
    if pin == "cores":
        cores = [core for node in nodes for core in node]
        if len(cores) < ranks:
            return None
        return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
    if pin == "auto" and 1 < len(nodes) <= ranks:
        return list(nodes[rank * len(nodes) // ranks])
    return None


def place(pin: str) -> None:
    """Pin this process, and make its GPU the current one where there is one for each local rank."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cores = share(pin, rank, ranks, memory_nodes(sorted(os.sched_getaffinity(0))))
    if cores is not None:
        os.sched_setaffinity(0, cores)
    import torch

    if 0 < ranks <= torch.cuda.device_count():
        torch.cuda.set_device(rank)


def main() -> None:
    pin, script, *args = sys.argv[1:]
    place(pin)
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
