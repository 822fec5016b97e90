"""Triton modules: compiled to cubins ahead of time, loaded and launched with little host time.

A data-dependent index out of range or an integer division by zero does not stop the GPU. The kernel leaves a code in
its fault word, which lies in pinned host memory, and continues with position 0 or divisor 1. The host looks at the
words, without waiting for the GPU, when the program is called the next time, and raises then. ``GpuKernels.check``
raises at once if the caller has synchronised before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from dcompile.errors import DCompileError, DividedByZero, OutOfRange, ToolchainError
from dcompile.runtime.cubin import resources
from dcompile.runtime.cuda_driver import enter_context, load_function, primary_context
from dcompile.runtime.cuda_launch import LaunchPlan, launch_function

MODULE, KERNELS = "kernels_triton.py", "triton.json"

ALIGNED_BYTES = 16
"""Alignment compiled kernels count on: the widest access of a thread. PyTorch and the arena give more; inputs that are
views may not have it, for them a second version is compiled when the first such call comes."""

INDEX_FAULT, DIVISION_FAULT = 1, 2


class HasLaunch(Protocol):
    """Block sizes of a kernel."""

    @property
    def block(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def num_warps(self) -> int: ...


class HasSignature(Protocol):
    """How a printed function is compiled and launched (``codegen.triton.TritonSignature``)."""

    @property
    def buffers(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> int: ...
    @property
    def launch(self) -> HasLaunch: ...
    @property
    def programs(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class Compiled:
    """One kernel as it is stored in a cache entry.

    Attributes:
        name: its function, and the stem of its cubin's file.
        buffers: Triton pointer types.
        sizes: i64 parameters that follow.
        block, inner, num_warps: the launch.
        programs: Python text of the number of programs over ``s0``, ``s1``, ...
        where: ops and source lines.
        shared_bytes: dynamic shared memory of a program.
        registers, frame_bytes: of a thread; a frame is local memory, of spilled registers above all.
    """

    name: str
    buffers: tuple[str, ...]
    sizes: int
    block: int
    inner: int
    num_warps: int
    programs: str
    where: str
    shared_bytes: int = 0
    registers: int = 0
    frame_bytes: int = 0


def triton_fingerprint() -> str | None:
    """What decides the machine code of kernels on the current device; None without Triton or a CUDA device."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    import triton

    return f"triton {triton.__version__} sm_{_capability()}"


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def compile_module(
    source: str, signatures: Mapping[str, HasSignature], folder: Path, capability: int | None = None
) -> None:
    """Compile every kernel of a printed module into ``folder``: the module, one cubin a kernel, and their launches.

    Args:
        capability: of the GPU, 90 for 9.0; the current device's if None. No GPU is needed if it is given.

    Raises:
        ToolchainError: Triton is missing or rejects a kernel.
    """
    target = capability or _capability()
    (folder / MODULE).write_text(source)
    module = load_module(folder / MODULE)
    wanted = [
        Compiled(name, s.buffers, s.sizes, s.launch.block, s.launch.inner, s.launch.num_warps, s.programs, s.where)
        for name, s in signatures.items()
    ]

    def build(kernel: Compiled) -> Compiled:
        cubin, shared_bytes = compile_kernel(module, kernel, target, aligned=True)
        (folder / f"{kernel.name}.cubin").write_bytes(cubin)
        return Compiled(**{**asdict(kernel), "shared_bytes": shared_bytes, **asdict(resources(cubin))})

    workers = min(len(wanted), os.cpu_count() or 1) or 1
    with ThreadPoolExecutor(workers, thread_name_prefix="dcompile-triton") as pool:
        done = list(pool.map(build, wanted))
    (folder / KERNELS).write_text(json.dumps({"target": target, "kernels": [asdict(kernel) for kernel in done]}))


def load_module(path: Path) -> ModuleType:
    """The printed module, imported under a name of its own.

    Raises:
        ToolchainError: Triton is not installed.
    """
    name = f"dcompile_triton_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ToolchainError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks functions' globals up there
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ToolchainError(f"GPU kernels need Triton: {error}. Instead: pip install triton") from error
    finally:
        sys.modules.pop(name, None)
    return module


PARSE_TRIES = 5
"""Threads rarely meet in CPython's parser: 1 of about 1,500 kernels in one run of the tests."""


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


def compile_kernel(module: ModuleType, kernel: Compiled, capability: int, aligned: bool) -> tuple[bytes, int]:
    """One function as a cubin, and the bytes of dynamic shared memory it needs.

    Args:
        aligned: every buffer is at a multiple of ``ALIGNED_BYTES``.

    Raises:
        ToolchainError: Triton rejects it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    buffers = {f"b{n}": kind for n, kind in enumerate(kernel.buffers)}
    signature = {**buffers, **{f"s{n}": "i64" for n in range(kernel.sizes)}, "fault": "*i32"}
    signature |= {"X": "constexpr", "R": "constexpr"}
    attributes = {(n,): [["tt.divisibility", ALIGNED_BYTES]] for n in range(len(buffers))} if aligned else {}

    def compile_once() -> Any:
        return triton.compile(
            ASTSource(getattr(module, kernel.name), signature, {"X": kernel.block, "R": kernel.inner}, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernel.num_warps},
        )

    try:
        made = _parsed_beside_others(compile_once)
    except Exception as error:  # Triton has no common base class of errors
        raise ToolchainError(f"Triton rejects the kernel {kernel.name} of {kernel.where}: {error}") from error
    return made.asm["cubin"], made.metadata.shared


class GpuKernels:
    """The loaded kernels of a program on the device that is current when they are loaded.

    Attributes:
        functions: each takes data pointers and sizes as integers and what ``stream`` gave, and launches.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Load what ``compile_module`` left in ``folder``; ``name`` is the program's, for messages.

        Raises:
            DCompileError: the driver refuses a kernel.
        """
        found = json.loads((folder / KERNELS).read_text())
        self.name = name
        self._target: int = found["target"]
        self._path = folder / MODULE
        kernels = [Compiled(**{**entry, "buffers": tuple(entry["buffers"])}) for entry in found["kernels"]]
        self._device = torch.cuda.current_device()
        self._faults = torch.zeros(max(len(kernels), 1), dtype=torch.int32).pin_memory()
        self._words = memoryview(self._faults.numpy())  # type: ignore[arg-type]
        self._kernels = kernels
        self._context = primary_context(self._device)
        enter_context(self._context)
        self._streams: dict[int, ctypes.c_void_p] = {}
        self.functions: dict[str, Callable[..., int]] = {}
        for number, kernel in enumerate(kernels):
            cubin = (folder / f"{kernel.name}.cubin").read_bytes()
            self.functions[kernel.name] = self._function(kernel, cubin, self._faults.data_ptr() + 4 * number)

    def stream(self, device: torch.device) -> ctypes.c_void_p:
        """The current stream of ``device``, for the launches of one call.

        Raises:
            IndexError, ZeroDivisionError: an earlier call's kernel reported one.
            DCompileError: another device than the one the program was loaded on.
        """
        if device.index != self._device or torch.cuda.current_device() != self._device:
            raise DCompileError(
                f"{self.name} was loaded on cuda:{self._device} and is called with tensors on {device} while "
                f"cuda:{torch.cuda.current_device()} is current. Instead: use one device a process, chosen with "
                "torch.cuda.set_device before the first call"
            )
        enter_context(self._context)
        self.poll()
        handle = torch.cuda.current_stream(device).cuda_stream
        if (known := self._streams.get(handle)) is None:
            known = self._streams[handle] = ctypes.c_void_p(handle)
        return known

    def poll(self) -> None:
        """``check`` if a kernel that has finished reported something. Fast."""
        if any(self._words):
            self.check()

    def check(self) -> None:
        """Raise what kernels that have finished reported since the last check.

        Raises:
            IndexError: a data-dependent index was out of range.
            ZeroDivisionError: an integer was divided by zero.
        """
        codes = list(self._words)
        self._faults.zero_()
        for kernel, code in zip(self._kernels, codes, strict=False):
            if code == INDEX_FAULT:
                raise OutOfRange(f"index out of range in {kernel.where}, in an earlier call of {self.name}")
            if code == DIVISION_FAULT:
                raise DividedByZero(f"integer division by zero in {kernel.where}, in an earlier call of {self.name}")

    def _function(self, kernel: Compiled, cubin: bytes, fault: int) -> Callable[..., int]:
        slow: list[Callable[..., int]] = []

        def unaligned(*values: Any) -> int:
            if not slow:
                made, shared_bytes = compile_kernel(load_module(self._path), kernel, self._target, aligned=False)
                slow.append(launch_function(self._plan(kernel, made, shared_bytes, fault), 1, None))
            return slow[0](*values)

        return launch_function(self._plan(kernel, cubin, kernel.shared_bytes, fault), ALIGNED_BYTES, unaligned)

    @staticmethod
    def _plan(kernel: Compiled, cubin: bytes, shared_bytes: int, fault: int) -> LaunchPlan:
        return LaunchPlan(
            function=load_function(cubin, kernel.name, shared_bytes),
            buffers=len(kernel.buffers),
            sizes=kernel.sizes,
            programs=kernel.programs,
            threads=kernel.num_warps * 32,
            shared_bytes=shared_bytes,
            fault=fault,
        )


__all__ = ["Compiled", "GpuKernels", "compile_kernel", "compile_module", "load_module", "triton_fingerprint"]
