"""Compiles Triton functions to cubins; also a program of its own that does so for jobs it reads.

As a program it is started by ``triton_pool`` and reads one JSON job a line, answers each with one line, and ends when
its input does or nothing comes for ``IDLE_S``. It imports Triton alone, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import importlib.util
import json
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ALIGNED_BYTES = 16
"""Alignment compiled kernels count on: the widest access of a thread. PyTorch and the arena give more; inputs that are
views may not have it, for them a second version is compiled when the first such call comes."""

IDLE_S = 60.0
"""How long a worker waits for its next job: longer than between two graphs of a program, shorter than a training."""

PARSE_TRIES = 5
"""Threads rarely meet in CPython's parser: 1 of about 1,500 kernels in one run of the tests."""


def module_at(path: Path) -> ModuleType:
    """The printed module, imported under a name of its own.

    Raises:
        ImportError: Triton is not installed.
    """
    name = f"dcompile_triton_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks functions' globals up there
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name, None)
    return module


def cubin_of(
    module: ModuleType,
    name: str,
    buffers: Sequence[str],
    sizes: int,
    blocks: Mapping[str, int],
    num_warps: int,
    capability: int,
    aligned: bool,
) -> tuple[bytes, int]:
    """One function as a cubin, and the bytes of dynamic shared memory it needs.

    Args:
        buffers: Triton pointer types.
        sizes: i64 parameters that follow.
        blocks: its constant parameters.
        aligned: every buffer is at a multiple of ``ALIGNED_BYTES``.

    Raises:
        Exception: Triton rejects it; its errors have no common base class.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**{f"b{n}": kind for n, kind in enumerate(buffers)}, **{f"s{n}": "i64" for n in range(sizes)}}
    signature |= {"fault": "*i32"} | dict.fromkeys(blocks, "constexpr")
    attributes = {(n,): [["tt.divisibility", ALIGNED_BYTES]] for n in range(len(buffers))} if aligned else {}

    def compile_once() -> Any:
        return triton.compile(
            ASTSource(getattr(module, name), signature, dict(blocks), attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )

    made = _parsed_beside_others(compile_once)
    return made.asm["cubin"], made.metadata.shared


def _parsed_beside_others(compile_once: Callable[[], Any]) -> Any:
    """``compile_once()``, again if CPython confused its parse with another thread's.

    CPython 3.11 counts the depth of a syntax tree under construction once for all threads, and raises SystemError when
    a switch between two of them makes the count come out wrong.
    """
    for _ in range(PARSE_TRIES - 1):
        try:
            return compile_once()
        except SystemError as error:
            if "recursion depth mismatch" not in str(error):
                raise
    return compile_once()


def main() -> None:
    """Jobs from standard input, answers to standard output, until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what compilers print is no answer
    modules: dict[str, ModuleType] = {}
    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        job = json.loads(line)
        path, out = job.pop("path"), job.pop("out")
        try:
            if path not in modules:
                modules = {path: module_at(Path(path))}
            cubin, shared_bytes = cubin_of(modules[path], **job)
            Path(out).write_bytes(cubin)
            answer: dict[str, Any] = {"shared_bytes": shared_bytes}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
