"""Which devices a graph works on, and whether kernels can be made for them."""

from __future__ import annotations

from dcompile.errors import ToolchainError
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Loop, View
from dcompile.ir.types import Value
from dcompile.options import Options
from dcompile.runtime.toolchain import probe
from dcompile.runtime.triton_kernels import triton_fingerprint


def why_no_kernels(graph: Graph, options: Options) -> str | None:
    """Why no kernels can be made for ``graph``; None if they can."""
    present = devices(graph)
    if strange := present - {"cpu", "cuda"}:
        return f"there is no kernel printer for {', '.join(sorted(strange))}"
    if "cuda" in present:
        if triton_fingerprint() is None:
            return "GPU kernels need Triton and a CUDA device"
        for node in graph.nodes:
            if isinstance(node, Loop) and len(mixed := _touched(graph, node)) > 1:
                return f"{', '.join(node.origin.ops)} mixes tensors of {' and '.join(sorted(mixed))}"
    if "cpu" in loop_devices(graph):
        try:
            probe(options.cxx)
        except ToolchainError as error:
            return str(error)
    return None


def devices(graph: Graph) -> set[str]:
    return {found.device for found in graph.defs.values() if isinstance(found, Value)}


def loop_devices(graph: Graph) -> set[str]:
    """Devices that kernels are compiled for; copies of views on a device become kernels too."""
    return {n.defs[0].device for n in graph.nodes if isinstance(n, Loop | View)}


def _touched(graph: Graph, node: Loop) -> set[str]:
    """Devices of the tensors a loop reads and writes."""
    return {node.defs[0].device} | {graph.value(name).device for name in node.operands}
