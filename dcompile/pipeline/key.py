"""What a generated program depends on."""

from __future__ import annotations

import torch

from dcompile.analyse.calibration import calibrated
from dcompile.analyse.cost import CostModel
from dcompile.analyse.topology import read_topology
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import print_graph
from dcompile.lower import Lowered
from dcompile.options import Options
from dcompile.pipeline.devices import devices, loop_devices
from dcompile.runtime.cache import cache_key
from dcompile.runtime.calibrate import calibration_of
from dcompile.runtime.comm import group_ranks
from dcompile.runtime.compiled import own_sources
from dcompile.runtime.toolchain import compiler_fingerprint
from dcompile.runtime.triton_kernels import triton_fingerprint


def costs_of(lowered: Lowered, options: Options) -> CostModel:
    """The prices of the user's topology; else documented ones, or measured ones of the groups that were calibrated."""
    if options.topology is not None:
        ranks = {label: group_ranks(group) for label, group in lowered.group_names.items()}
        return read_topology(options.topology).costs(ranks)
    starts = [node for node in lowered.graph.nodes if isinstance(node, Start)]
    device = "cuda" if "cuda" in devices(lowered.graph) else "cpu"
    prices = CostModel.analytical(device, max((start.group.size for start in starts), default=1))
    measured = {start.group.label: calibration_of(lowered.group_names[start.group.label]) for start in starts}
    return calibrated(prices, device, {label: found for label, found in measured.items() if found is not None})


def key_of(lowered: Lowered, options: Options) -> str:
    """Everything the generated program depends on."""
    return cache_key(
        print_graph(lowered.graph),
        options.affects_code(),
        repr(costs_of(lowered, options)),
        options.timeline,
        own_sources(),
        torch.__version__,
        compiler_fingerprint(options.cxx) if "cpu" in loop_devices(lowered.graph) else None,
        triton_fingerprint() if "cuda" in devices(lowered.graph) else None,
    )
