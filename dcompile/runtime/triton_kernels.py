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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from dcompile.errors import DCompileError, DividedByZero, OutOfRange, ToolchainError
from dcompile.runtime.cubin import resources
from dcompile.runtime.cuda_driver import enter_context, load_function, primary_context
from dcompile.runtime.cuda_launch import LaunchPlan, launch_function
from dcompile.runtime.triton_pool import Job, compile_jobs
from dcompile.runtime.triton_worker import ALIGNED_BYTES, cubin_of, module_at

MODULE, KERNELS = "kernels_triton.py", "triton.json"

INDEX_FAULT, DIVISION_FAULT = 1, 2


class HasLaunch(Protocol):
    """Block sizes of a kernel."""

    @property
    def block(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def num_warps(self) -> int: ...


class HasVariant(Protocol):
    """One way to cut a kernel (``codegen.triton.Variant``)."""

    @property
    def name(self) -> str: ...
    @property
    def launch(self) -> HasLaunch: ...
    @property
    def programs(self) -> str: ...


class HasSignature(Protocol):
    """How a printed function is compiled and launched (``codegen.triton.TritonSignature``)."""

    @property
    def buffers(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> int: ...
    @property
    def variants(self) -> Sequence[HasVariant]: ...
    @property
    def structure(self) -> str: ...
    @property
    def spans(self) -> tuple[int, ...]: ...
    @property
    def hints(self) -> tuple[int, ...]: ...
    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class Compiled:
    """One kernel as it is stored in a cache entry.

    Attributes:
        name: its function, and the stem of its cubin's file.
        called: what the host calls it, whichever variant it is; "" is ``name``.
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
    called: str = ""


class Tunes(Protocol):
    """Chooses between variants of a kernel (``runtime.autotune.Tuner``)."""

    def known(self, signature: HasSignature) -> HasLaunch | None:
        """The launch that was best before; None if that is not known."""

    def best(self, signature: HasSignature, variants: Sequence[Compiled], folder: Path) -> Compiled:
        """The best of the variants that compile; the first is the default."""


def triton_fingerprint() -> str | None:
    """What decides the machine code of kernels on the current device; None without Triton or a CUDA device."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    import triton

    return f"triton {triton.__version__} sm_{_capability()}"


def hardware(device: int) -> str:
    """What decides how fast a kernel runs on that device: the card, its driver and Triton."""
    name, properties = triton_fingerprint(), torch.cuda.get_device_properties(device)
    return f"{name} {properties.name} {properties.multi_processor_count} {torch.version.cuda}"


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def compile_module(
    source: str,
    signatures: Mapping[str, HasSignature],
    folder: Path,
    capability: int | None = None,
    tuner: Tunes | None = None,
) -> None:
    """Compile every kernel of a printed module into ``folder``: the module, one cubin a kernel, and their launches.

    Args:
        capability: of the GPU, 90 for 9.0; the current device's if None. No GPU is needed if it is given.
        tuner: chooses between the variants of a kernel; None takes each as it is.

    Raises:
        ToolchainError: Triton is missing or rejects a kernel.
    """
    target = capability or _capability()
    (folder / MODULE).write_text(source)
    variants = {called: _variants(called, signature, tuner) for called, signature in signatures.items()}
    kernels = [kernel for found in variants.values() for kernel in found]
    if kernels:
        need_triton()
    jobs = [
        Job(
            str(folder / MODULE), str(folder / f"{k.name}.cubin"), k.name, k.buffers, k.sizes,
            {"X": k.block, "R": k.inner}, k.num_warps, target,
        )
        for k in kernels
    ]  # fmt: skip
    answers = dict(zip((k.name for k in kernels), compile_jobs(jobs), strict=True))
    done = []
    for called, found in variants.items():
        if isinstance(why := answers[found[0].name], str):
            raise _rejected(found[0], why)
        built = [_built(k, shared, folder) for k in found if isinstance(shared := answers[k.name], int)]
        done.append(built[0] if len(built) == 1 or tuner is None else tuner.best(signatures[called], built, folder))
    chosen = {kernel.name for kernel in done}
    for kernel in kernels:
        if kernel.name not in chosen:
            (folder / f"{kernel.name}.cubin").unlink(missing_ok=True)
    (folder / KERNELS).write_text(json.dumps({"target": target, "kernels": [asdict(kernel) for kernel in done]}))


def _variants(called: str, signature: HasSignature, tuner: Tunes | None) -> list[Compiled]:
    """The kernel as it was printed, first, and its variants; only one of them if that is known to be the best."""
    found = [
        Compiled(v.name, signature.buffers, signature.sizes, v.launch.block, v.launch.inner, v.launch.num_warps,
                 v.programs, signature.where, called=called)
        for v in signature.variants
    ]  # fmt: skip
    if tuner is None:
        return found[:1]
    known = tuner.known(signature)
    return [kernel for kernel, v in zip(found, signature.variants, strict=True) if known in (None, v.launch)] or found


def _built(kernel: Compiled, shared_bytes: int, folder: Path) -> Compiled:
    used = resources((folder / f"{kernel.name}.cubin").read_bytes())
    return replace(kernel, shared_bytes=shared_bytes, registers=used.registers, frame_bytes=used.frame_bytes)


def need_triton() -> None:
    """Raises ``ToolchainError`` if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ToolchainError("GPU kernels need Triton. Instead: pip install triton")


def load_module(path: Path) -> ModuleType:
    """The printed module, imported under a name of its own.

    Raises:
        ToolchainError: Triton is not installed.
    """
    try:
        return module_at(path)
    except ImportError as error:
        raise ToolchainError(f"GPU kernels need Triton: {error}. Instead: pip install triton") from error


def compile_kernel(module: ModuleType, kernel: Compiled, capability: int, aligned: bool) -> tuple[bytes, int]:
    """One function as a cubin, and the bytes of dynamic shared memory it needs.

    Args:
        aligned: every buffer is at a multiple of ``ALIGNED_BYTES``.

    Raises:
        ToolchainError: Triton rejects it.
    """
    blocks = {"X": kernel.block, "R": kernel.inner}
    try:
        return cubin_of(
            module, kernel.name, kernel.buffers, kernel.sizes, blocks, kernel.num_warps, capability, aligned
        )
    except Exception as error:  # Triton has no common base class of errors
        raise _rejected(kernel, f"{type(error).__name__}: {error}") from error


def _rejected(kernel: Compiled, why: str) -> ToolchainError:
    return ToolchainError(f"Triton rejects the kernel {kernel.name} of {kernel.where}: {why}")


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
            self.functions[kernel.called or kernel.name] = self._function(
                kernel, cubin, self._faults.data_ptr() + 4 * number
            )

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
        return plan_of(kernel, load_function(cubin, kernel.name, shared_bytes), shared_bytes, fault)


def plan_of(kernel: Compiled, function: ctypes.c_void_p, shared_bytes: int, fault: int) -> LaunchPlan:
    """How a loaded kernel is launched."""
    return LaunchPlan(
        function=function,
        buffers=len(kernel.buffers),
        sizes=kernel.sizes,
        programs=kernel.programs,
        threads=kernel.num_warps * 32,
        shared_bytes=shared_bytes,
        fault=fault,
    )


__all__ = [
    "Compiled",
    "GpuKernels",
    "HasSignature",
    "Tunes",
    "compile_kernel",
    "compile_module",
    "hardware",
    "load_module",
    "triton_fingerprint",
]
