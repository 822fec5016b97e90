"""How many operators of PyTorch's own database Inductor compiles to library calls alone, for docs/operators.md.

Usage: ``python -m benchmarks.operator_kernels [--out FILE] [pattern...]``; a pattern is a shell pattern of names.

For every operator the first float32 sample is captured as ``tests.opinfo`` captures it for this compiler, forward and,
where it has gradients, backward, and Inductor prints its program for the CPU. The program is read, not built or run:
calls of generated kernels and of library ops are counted, and allocations are neither. About a second an operator.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from fnmatch import fnmatch
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering

from tests.opinfo.check import as_graph, summary
from tests.opinfo.operators import OPERATORS, eligible, samples

KERNEL = re.compile(r"\bcpp_\w+\(")
LIBRARY = re.compile(r"\b(?:extern_kernels\.\w+|(?:torch\.ops\.)?(?:aten|prims|mkldnn|mkl|quantized|onednn)\.[\w.]+)\(")
ALLOCATION = re.compile(r"\baten\.(?:new_)?empty\w*")


def count_calls(program: str) -> tuple[int, list[str]]:
    """Kernel calls and names of the library calls in the text of a program of Inductor's."""
    lines = program[program.index("def call(") :].splitlines()
    body = [line.split("#")[0] for line in lines[1 : _end(lines)]]
    library = [found for line in body for found in LIBRARY.findall(line) if not ALLOCATION.search(found)]
    return sum(len(KERNEL.findall(line)) for line in body), [name.rstrip("(") for name in library]


def _end(lines: Sequence[str]) -> int:
    """Where the first function of ``lines`` ends."""
    depth = len(lines[0]) - len(lines[0].lstrip())
    inside = (n for n, line in enumerate(lines[1:], 1) if line.strip() and len(line) - len(line.lstrip()) <= depth)
    return next(inside, len(lines))


@contextmanager
def printed_programs() -> Iterator[list[str]]:
    """Inductor stops when it has printed a program; the texts are collected here."""
    programs: list[str] = []

    def keep(_: GraphLowering, text: Any) -> Any:
        programs.append(text.value)
        return SimpleNamespace(call=None, __file__=__file__)

    settings = inductor_config.patch(fx_graph_cache=False, force_disable_caches=True, compile_threads=1)
    with (
        settings,
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
    ):
        yield programs


def _listing_results(graph: fx.GraphModule, count: int) -> fx.GraphModule:
    """The output lists the ``count`` results, as in a graph of Dynamo's."""
    (output,) = graph.graph.find_nodes(op="output")
    with graph.graph.inserting_before(output):
        output.args = (tuple(graph.graph.call_function(getitem, (output.args[0], n)) for n in range(count)),)
    graph.recompile()
    return graph


def measure(name: str) -> dict[str, Any]:
    """Kernels and library calls of the operator's first sample; or why there are none."""
    grad = OPERATORS[name].supports_autograd
    (sample,) = samples(name, torch.float32, 1, grad)
    inputs = sample.fresh(grad)
    graph = as_graph(sample.function, len(inputs))
    with printed_programs() as programs:
        try:
            compile_fx(_listing_results(graph, len(sample.function(*sample.fresh(grad)))), inputs)
        except Exception as error:
            return {"error": summary(error)}
    counted = [count_calls(text) for text in programs]
    return {"kernels": sum(k for k, _ in counted), "library": [op for _, ops in counted for op in ops]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    for name in eligible(torch.float32):
        if any(fnmatch(name, pattern) for pattern in given.patterns):
            found[name] = measure(name)
            print(name, json.dumps(found[name]), flush=True)
    alone = [name for name, row in found.items() if row.get("kernels") == 0 and row["library"]]
    print(f"{len(found)} operators, {len(alone)} only call the library: {' '.join(alone)}")
    if given.out is not None:
        given.out.write_text(report(found))


def report(found: Mapping[str, dict[str, Any]]) -> str:
    """The results as JSON, an operator a line."""
    about = {"date": str(date.today()), "torch": torch.__version__, "python": platform.python_version()}
    about["sample"] = "first of each operator, float32, forward and backward; programs read, not run"
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
    return f'{{\n{head} "operators": {{\n{rows}\n }}\n}}\n'


if __name__ == "__main__":
    main()
