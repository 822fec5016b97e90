"""Measured prices of pieces of a program: library calls and kernels, run on memory of their own on the GPU at hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcompile.codegen.triton import print_triton
from dcompile.errors import DCompileError
from dcompile.ir.canonical import canonical
from dcompile.ir.graph import Graph, hint
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.text import print_node
from dcompile.ir.types import Value
from dcompile.runtime.autotune import timed
from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.externs import resolve_op
from dcompile.runtime.triton_kernels import GpuKernels, Tunes, compile_module, hardware

PRICE = "price.json"


def rounds_to_tf32() -> bool:
    """Whether the library may round operands of f32 matrix products to tf32 now."""
    return torch.get_float32_matmul_precision() != "highest"


class Prices:
    """Microseconds of KERNELS graphs (``Context.measure``), once for each structure.

    Args:
        cache: keeps results, by hardware, versions and structure.
        tuner: chooses between the variants of kernels before they are measured.
        device: number of the GPU.
    """

    def __init__(self, cache: Cache, tuner: Tunes, device: int) -> None:
        self._cache, self._tuner, self._device = cache, tuner, device

    def __call__(self, graph: Graph) -> float | None:
        """The time of all nodes of ``graph`` one after the other; None where it cannot be measured."""
        key = cache_key("price", hardware(self._device), torch.__version__, rounds_to_tf32(), structure(graph))
        with suppress(OSError, ValueError, KeyError, DCompileError, torch.OutOfMemoryError):
            entry = self._cache.find(key) or _in_a_thread(
                partial(self._cache.fetch, key, partial(self._measure, graph))
            )
            return float(json.loads((entry / PRICE).read_text())["us"])
        return None

    def _measure(self, graph: Graph, entry: Path) -> None:
        module = print_triton(graph, variants=True)
        with tempfile.TemporaryDirectory() as name, torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                tensors = {v.name: _tensor(v, graph, self._device) for v in graph.defs.values() if isinstance(v, Value)}
                steps: list[Callable[[], object]] = []
                if module.signatures:
                    compile_module(module.source, module.signatures, Path(name), tuner=self._tuner)
                    kernels = GpuKernels(Path(name), "a measured piece")
                    handle = kernels.stream(torch.device("cuda", self._device))
                for position, node in enumerate(graph.nodes):
                    if isinstance(node, Kernel):
                        call = module.calls[position]
                        addresses = [tensors[buffer].data_ptr() for buffer in call.buffers]
                        sizes = [hint(size, graph.size_hints) for size in call.sizes]
                        steps.append(partial(kernels.functions[call.function], *addresses, *sizes, handle))
                    elif isinstance(node, Extern):
                        steps.append(_library_call(node, tensors))
                (us,) = timed([lambda: [step() for step in steps]], stream)
                stream.synchronize()
        (entry / PRICE).write_text(json.dumps({"us": us}))


def _in_a_thread(call: Callable[[], Path]) -> Path:
    """The result of ``call``, away from the modes of a thread that captures programs: there every tensor is fake."""
    with ThreadPoolExecutor(1, thread_name_prefix="dcompile-price") as pool:
        return pool.submit(call).result()


def structure(graph: Graph) -> str:
    """What decides how long ``graph`` takes: equal for graphs that differ in names only."""
    values = {name: found for name, found in graph.defs.items() if isinstance(found, Value)}
    names = {name: f"b{n}" for n, name in enumerate(values)}
    parts = [f"{symbol} = {size}" for symbol, size in sorted(graph.size_hints.items(), key=lambda item: str(item[0]))]
    parts += [f"{v.dtype.value} {v.shape} {v.stride} {v.device}" for v in values.values()]
    for node in graph.nodes:
        buffers = [names[name] for name in (*node.operands, *(d.name for d in node.defs))]
        own = canonical(node, values).key if isinstance(node, Kernel) else print_node(node.rename(names))
        parts.append(f"{buffers} {own}")
    return "\n".join(parts)


def _tensor(value: Value, graph: Graph, device: int) -> Tensor:
    """Memory laid out like ``value``, full of small numbers."""
    shape, stride = ([hint(n, graph.size_hints) for n in sizes] for sizes in (value.shape, value.stride))
    made = torch.empty_strided(shape, stride, dtype=value.dtype.torch, device=torch.device("cuda", device))
    return made.normal_() if value.dtype.is_float else made.zero_()


def _library_call(node: Extern, tensors: dict[str, Tensor]) -> Callable[[], object]:
    """The call on the given tensors, into the memory of its result.

    Raises:
        DCompileError: it has no overload that takes that.
    """
    (out,) = node.outs
    if node.out_op is None or out is None:
        raise DCompileError(f"{node.op} does not write into given memory")
    arguments = [tensors[arg.name] if isinstance(arg, Ref) else arg for arg in node.args]
    keywords: dict[str, Any] = {name: tensors[v.name] if isinstance(v, Ref) else v for name, v in node.kwargs}
    return partial(resolve_op(node.out_op), *arguments, **keywords, out=tensors[out.name])


__all__ = ["Prices", "rounds_to_tf32", "structure"]
