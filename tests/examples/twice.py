"""One rank that runs an example eagerly and then compiled: ``python twice.py SCRIPT RESULT``.

Rank 0 writes the losses of both runs, and what dcompile has compiled, to the file ``RESULT``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

import dcompile

script, result = sys.argv[1:]
main = runpy.run_path(script, run_name="example")["main"]
eager = main(["--eager"])
compiled = main([])
counted = dcompile.counters()
if os.environ["RANK"] == "0":
    facts = {"graphs": counted.graphs, "breaks": counted.graph_breaks, "kernels": counted.kernels}
    facts |= {"world": dist.get_world_size(), "fallbacks": dict(counted.fallbacks)}
    Path(result).write_text(json.dumps({"eager": eager, "compiled": compiled, **facts}))
dist.barrier()
dist.destroy_process_group()
