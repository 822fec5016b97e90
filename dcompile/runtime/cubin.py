"""What a compiled kernel uses of a multiprocessor, read from its cubin: no device and no tool is needed.

A cubin is an ELF file. The section ``.nv.info`` lists facts as (format, kind, length, payload); those of kind
``REGISTERS`` and ``FRAME`` hold a symbol and a number (NVIDIA's "CUDA Binary Utilities" has tools to print them).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dcompile.errors import CompilerBug

_SIZED = 0x04
"""Format of an entry whose payload's length follows."""

_FRAME, _REGISTERS = 0x11, 0x2F
"""Kinds: bytes of stack frame, registers of a thread."""


@dataclass(frozen=True)
class Resources:
    """Of one thread.

    Attributes:
        registers: 32-bit registers.
        frame_bytes: local memory for spilled registers and arrays; 0 in a kernel that keeps everything in registers.
    """

    registers: int
    frame_bytes: int


def resources(cubin: bytes) -> Resources:
    """Of the largest function in ``cubin``.

    Raises:
        CompilerBug: it is no cubin.
    """
    found: dict[int, int] = {}
    for kind, payload in _facts(_section(cubin, b".nv.info")):
        if kind in (_FRAME, _REGISTERS) and len(payload) >= 8:
            found[kind] = max(found.get(kind, 0), struct.unpack_from("<II", payload)[1])
    if _REGISTERS not in found:
        raise CompilerBug("a cubin does not tell how many registers its kernel uses")
    return Resources(found[_REGISTERS], found.get(_FRAME, 0))


def _section(elf: bytes, name: bytes) -> bytes:
    """The bytes of a section of a 64-bit little-endian ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise CompilerBug("a cubin is not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + n * entry) for n in range(count)]
    strings = headers[names][4]
    for text, _, _, _, offset, size in headers:
        if elf[strings + text : elf.index(b"\0", strings + text)] == name:
            return elf[offset : offset + size]
    raise CompilerBug(f"a cubin has no section {name.decode()}")


def _facts(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(section):
        form, kind, length = struct.unpack_from("<BBH", section, at)
        if form == _SIZED:
            yield kind, section[at + 4 : at + 4 + length]
            at += 4 + length
        else:
            at += 4


__all__ = ["Resources", "resources"]
