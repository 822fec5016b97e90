"""Graphs of many samples, their kernels in one translation unit: a C++ compiler run for an operator, not for a graph.

Everything else is the compiler as users meet it: capture through AOTAutograd, all passes, the verifier, both
printers, and the loader of host programs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.capture import Captured
from dcompile.codegen.cpp import CppModule, prelude, print_cpp
from dcompile.codegen.wrapper import print_host
from dcompile.errors import ToolchainError
from dcompile.ir.nodes import Extern
from dcompile.lower import Lowered, SizeOf, lower
from dcompile.options import Options
from dcompile.pipeline import Kernels, run_passes
from dcompile.plan import Plan
from dcompile.runtime.program import Executable
from dcompile.runtime.toolchain import Arity, command, load_functions
from dcompile.watch import Watch

Functions = Mapping[str, Callable[..., int]]

ALLOCATIONS = ("aten.empty.", "aten.empty_strided.")
"""Library calls that compute nothing."""


@dataclass
class Program:
    """One captured graph, compiled but for its kernels.

    Attributes:
        launches, library_calls: steps of one call.
        externs, fallbacks: library calls, allocations aside, and those made for want of a rule, by op.
    """

    name: str
    lowered: Lowered
    plan: Plan
    kernels: CppModule
    host: str
    executable: Executable | None = None
    rejected: ToolchainError | None = None

    @property
    def launches(self) -> int:
        return len(self.kernels.calls)

    @property
    def externs(self) -> Counter[str]:
        calls = [n.op for n in self.plan.graph.nodes if isinstance(n, Extern)]
        return Counter(op for op in calls if not op.startswith(ALLOCATIONS))

    @property
    def fallbacks(self) -> Counter[str]:
        return Counter(n.op for n in self.plan.graph.nodes if isinstance(n, Extern) and n.fallback)

    def load(self, functions: Functions) -> None:
        self.executable = Executable(self.host, self.name, functions)

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        """Run.

        Raises:
            ToolchainError: the C++ compiler rejects a kernel.
        """
        if self.executable is None:
            raise self.rejected or ToolchainError(f"{self.name} was not built")
        for extra in self.lowered.extra_inputs:
            inputs.append(inputs[extra.input].shape[extra.dim] if isinstance(extra, SizeOf) else extra)
        return self.executable(inputs)


@dataclass
class Batch:
    """Programs that are built together.

    Args:
        folder: where libraries are written.
        optimisation: level of the C++ compiler; a lower one than users get builds faster.
    """

    folder: Path
    optimisation: str = "-O1"
    programs: list[Program] = field(default_factory=list)
    waiting: list[Program] = field(default_factory=list)
    units: int = 0

    def compile_graph(self, captured: Captured) -> Callable[[list[Any]], Sequence[Any]]:
        """Give this to ``dcompile.capture.capture``."""
        options = Options()
        ctx = Context(options, CostModel.analytical("cpu", 1))
        lowered = lower(captured.gm, captured.name.rstrip("0123456789"), options.eager_ops)
        plan = run_passes(lowered.graph, ctx, Watch(options, captured.name))
        kernels = print_cpp(plan.graph)
        host = print_host(plan, Kernels(kernels.calls), captured.name, False)
        program = Program(captured.name, lowered, plan, kernels, host)
        self.programs.append(program)
        self.waiting.append(program)

        def run(inputs: list[Any]) -> Sequence[Any]:
            if program in self.waiting:  # a graph that is only captured while another one runs
                self.build()
            return program(inputs)

        return run

    def build(self) -> None:
        """Compile and load what is waiting. A program whose kernels are rejected says so when called."""
        waiting, self.waiting = self.waiting, []
        try:
            self._build(waiting)
        except ToolchainError:
            for program in waiting:
                try:
                    self._build([program])
                except ToolchainError as error:
                    program.rejected = error

    def _build(self, programs: Sequence[Program]) -> None:
        self.units += 1
        texts, signatures, names = [prelude()], {}, []
        for number, program in enumerate(programs):
            body = program.kernels.source.removeprefix(prelude())
            renamed = {name: f"g{number}_{name}" for name in program.kernels.signatures}
            for old, new in renamed.items():
                body = re.sub(rf"\b{old}\b", new, body)
                signatures[new] = Arity(program.kernels.signatures[old].buffers, program.kernels.signatures[old].sizes)
            texts.append(body)
            names.append(renamed)
        functions: Functions = {}
        if signatures:
            library = self.folder / f"batch{id(self):x}_{self.units}.so"
            self._compile("\n".join(texts), library)
            functions = load_functions(library, signatures)
            library.unlink()
        for program, renamed in zip(programs, names, strict=True):
            program.load({old: functions[new] for old, new in renamed.items()})

    def _compile(self, text: str, library: Path) -> None:
        source = library.with_suffix(".cpp")
        source.write_text(text)
        words = [self.optimisation if word == "-O3" else word for word in command(source, library)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise ToolchainError(done.stderr)
