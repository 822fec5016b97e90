"""What a generated program depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.analyse.calibration import calibrated
from dcompile.analyse.cost import CostModel
from dcompile.analyse.topology import read_topology
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import print_graph
from dcompile.lower import Lowered
from dcompile.options import Options
from dcompile.pipeline.devices import devices, loop_devices
from dcompile.pipeline.prices import rounds_to_tf32
from dcompile.runtime.cache import cache_key
from dcompile.runtime.calibrate import calibration_of
from dcompile.runtime.comm import group_ranks
from dcompile.runtime.compiled import own_sources
from dcompile.runtime.toolchain import compiler_fingerprint
from dcompile.runtime.triton_kernels import triton_fingerprint


@dataclass(frozen=True)
class Traffic:
    """What the prices of a program depend on.

    Attributes:
        device: where it computes.
        sizes: number of ranks by group label.
        groups: process group, as the traced program names it, by label.
    """

    device: str
    sizes: Mapping[str, int]
    groups: Mapping[str, Any]


def traffic_of(lowered: Lowered) -> Traffic:
    """The groups a program communicates in."""
    sizes = {node.group.label: node.group.size for node in lowered.graph.nodes if isinstance(node, Start)}
    return Traffic("cuda" if "cuda" in devices(lowered.graph) else "cpu", sizes, lowered.group_names)


def costs_of(traffic: Traffic, options: Options) -> CostModel:
    """The prices of the user's topology; else documented ones, or measured ones of the groups that were calibrated."""
    if options.topology is not None:
        ranks = {label: group_ranks(group) for label, group in traffic.groups.items()}
        return read_topology(options.topology).costs(ranks)
    prices = CostModel.analytical(traffic.device, max(traffic.sizes.values(), default=1))
    measured = {label: calibration_of(traffic.groups[label]) for label in traffic.sizes}
    return calibrated(prices, traffic.device, {label: found for label, found in measured.items() if found is not None})


def key_of(lowered: Lowered, options: Options) -> str:
    """Everything the generated program depends on."""
    return cache_key(
        print_graph(lowered.graph),
        options.affects_code(),
        repr(costs_of(traffic_of(lowered), options)),
        options.timeline,
        rounds_to_tf32(),
        own_sources(),
        torch.__version__,
        compiler_fingerprint(options.cxx) if "cpu" in loop_devices(lowered.graph) else None,
        triton_fingerprint() if "cuda" in devices(lowered.graph) else None,
    )
