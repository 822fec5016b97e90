"""The few calls of the CUDA driver that launching needs, through ctypes: no compiler and no Triton at run time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType

from dcompile.errors import DCompileError, ToolchainError

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

_PLAIN_SHARED_BYTES = 48 * 1024
"""Shared memory a kernel gets without asking for more first."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The driver.

    Raises:
        ToolchainError: there is none on this machine.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ToolchainError(f"the CUDA driver does not load: {error}. Instead: install an NVIDIA driver") from error


def check(status: int, what: str) -> None:
    """Raise what a driver call returned.

    Raises:
        DCompileError: it failed.
    """
    if status != 0:
        text = ctypes.c_char_p()
        library().cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise DCompileError(f"{what} failed: {(text.value or b'unknown CUDA error').decode()} ({status})")


def primary_context(device: int) -> ctypes.c_void_p:
    """The context PyTorch works in on that device; it stays retained."""
    driver = library()
    check(driver.cuInit(0), "cuInit")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(device)), "cuDeviceGet")
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context


def enter_context(context: ctypes.c_void_p) -> None:
    """Make ``context`` the calling thread's; threads that have not used CUDA yet have none."""
    status = library().cuCtxSetCurrent(context)
    if status:
        check(status, "cuCtxSetCurrent")


def load_function(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """The kernel ``name`` of a cubin, loaded into the current context for the life of the process."""
    driver = library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {name}")
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    if shared_bytes > _PLAIN_SHARED_BYTES:
        attribute = ctypes.c_int(_MAX_DYNAMIC_SHARED)
        check(driver.cuFuncSetAttribute(function, attribute, ctypes.c_int(shared_bytes)), f"shared memory of {name}")
    return function


@lru_cache(maxsize=1)
def _copier() -> Callable[..., int]:
    copier = library().cuMemcpyDtoDAsync_v2
    copier.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    return copier


def copy_on_device(target: int, source: int, nbytes: int, stream: int) -> None:
    """Copy between addresses that the current context has mapped, a peer's too, in the order of ``stream``."""
    status = _copier()(target, source, nbytes, stream)
    if status:
        check(status, f"a copy of {nbytes} bytes between GPUs")


class DeviceMemory:
    """Buffers of the current context that no allocator knows of, filled with words, freed at the end of the block.

    Args:
        nbytes: of each buffer.
        fills: the 32-bit word that fills each.
    """

    def __init__(self, nbytes: Sequence[int], fills: Sequence[int]) -> None:
        self._wanted = list(zip(nbytes, fills, strict=True))
        self._buffers: list[ctypes.c_uint64] = []

    def __enter__(self) -> list[int]:
        """Their addresses.

        Raises:
            DCompileError: there is no room for them.
        """
        driver = library()
        try:
            for nbytes, fill in self._wanted:
                words, address = -(-max(nbytes, 4) // 4), ctypes.c_uint64()
                check(
                    driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(4 * words)), "memory of a measurement"
                )
                self._buffers.append(address)
                check(driver.cuMemsetD32_v2(address, ctypes.c_uint(fill), ctypes.c_size_t(words)), "filling it")
        except DCompileError:
            self._free()
            raise
        return [int(address.value) for address in self._buffers]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()

    def _free(self) -> None:
        while self._buffers:
            library().cuMemFree_v2(self._buffers.pop())
