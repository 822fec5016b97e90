"""The C++ compiler: finding it, running it, loading what it made."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dcompile.errors import ToolchainError

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fwrapv",
    "-fno-exceptions",
    "-fno-plt",
    "-w",
)
"""Strict IEEE arithmetic but for contraction to fused multiply-adds; integer overflow wraps as in eager PyTorch."""

CANDIDATES = ("g++", "clang++", "c++")
OUTPUT_LINES = 40
"""Lines of compiler output an error message carries."""


@dataclass(frozen=True)
class Arity:
    """Parameters of a kernel function: pointers, then int64 sizes, then the int64 thread count."""

    buffers: int
    sizes: int


def find_compiler(cxx: str | None = None) -> tuple[str, ...]:
    """The compiler command, as words that begin with an absolute path: ``cxx``, else the first of ``CANDIDATES`` found.

    Raises:
        ToolchainError: there is none; the message says how to install one.
    """
    if cxx:
        words = tuple(shlex.split(cxx))
        if words and (found := shutil.which(words[0])):
            return (os.path.abspath(found), *words[1:])
        raise ToolchainError(f"the C++ compiler {cxx!r} is not on the path. Instead: {_HOW_TO_INSTALL}")
    for name in CANDIDATES:
        if found := shutil.which(name):
            return (os.path.abspath(found),)
    raise ToolchainError(f"no C++ compiler ({', '.join(CANDIDATES)}) is on the path. Instead: {_HOW_TO_INSTALL}")


_HOW_TO_INSTALL = (
    "install one (Debian or Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), "
    "or name one with Options(cxx=...) or the environment variable CXX"
)


def openmp_library() -> Path | None:
    """PyTorch's own OpenMP runtime, so that kernels share its thread pool; None if this build ships none."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None


def command(source: Path, out: Path, cxx: str | None = None) -> tuple[str, ...]:
    """The command that compiles the file ``source`` to the shared library ``out``."""
    words = (*find_compiler(cxx), *FLAGS, str(source), "-o", str(out))
    library = openmp_library()
    if library is None:
        return words
    return (*words, str(library), f"-Wl,-rpath,{library.parent}")


def compile_shared(source: str, out: Path, cxx: str | None = None) -> None:
    """Compile C++ text to the shared library ``out``, which is put in place by an atomic rename.

    Raises:
        ToolchainError: no compiler, or it rejects the text; carries the command and the beginning of its output.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcompile-", dir=out.parent) as name:
        folder = Path(name)
        text, made = folder / "kernels.cpp", folder / "kernels.so"
        text.write_text(source)
        words = command(text, made, cxx)
        _run(words, folder)
        if not made.exists():
            raise ToolchainError(f"the C++ compiler made no library\n{shlex.join(words)}")
        os.replace(made, out)


PROBE = """#include <math.h>
#include <stdint.h>
extern "C" int64_t probe(double x) { return (int64_t)floor(x); }
"""


def probe(cxx: str | None = None) -> None:
    """Return if the compiler makes a shared library of a few lines; each command is tried once a process.

    Raises:
        ToolchainError: no compiler, or it does not work (no headers, no linker, an unknown flag).
    """
    if (why := _probe_words(find_compiler(cxx))) is not None:
        raise ToolchainError(why)


@lru_cache(maxsize=8)
def _probe_words(words: tuple[str, ...]) -> str | None:
    """What is wrong with the compiler command ``words``; None if it works."""
    with tempfile.TemporaryDirectory(prefix="dcompile-") as folder:
        try:
            compile_shared(PROBE, Path(folder) / "probe.so", shlex.join(words))
        except ToolchainError as error:
            return f"{error}\nInstead: {_HOW_TO_INSTALL}"
    return None


def _run(words: tuple[str, ...], folder: Path) -> str:
    """Standard output of a command that runs in ``folder``, where its temporary files go too.

    Raises:
        ToolchainError: it cannot be run, or fails.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=folder,
            env=environment,
            check=False,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ToolchainError(f"cannot run {shlex.join(words)}: {error}") from error
    if done.returncode != 0:
        shown = "\n".join((done.stderr + done.stdout).splitlines()[:OUTPUT_LINES])
        raise ToolchainError(f"the C++ compiler failed with status {done.returncode}\n{shlex.join(words)}\n{shown}")
    return done.stdout


@lru_cache(maxsize=8)
def compiler_fingerprint(cxx: str | None = None) -> str:
    """A short hash of what decides the machine code: compiler command and version, flags, this processor's features.

    Raises:
        ToolchainError: no compiler, or it does not run.
    """
    words = find_compiler(cxx)
    parts = [*words, *FLAGS, str(openmp_library() or "")]
    with tempfile.TemporaryDirectory(prefix="dcompile-") as folder:
        for question in (("--version",), ("-march=native", "-E", "-dM", "-x", "c++", os.devnull)):
            parts.append(_run((*words, *question), Path(folder)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_functions(path: Path, signatures: Mapping[str, Arity]) -> dict[str, Callable[..., int]]:
    """The functions of a compiled unit: each takes data pointers, sizes and the thread count as ints, gives its code.

    Raises:
        ToolchainError: the library does not load or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path))
        found: dict[str, Callable[..., int]] = {}
        for name, signature in signatures.items():
            function = getattr(library, name)
            function.restype = ctypes.c_int64
            function.argtypes = [ctypes.c_void_p] * signature.buffers + [ctypes.c_int64] * (signature.sizes + 1)
            found[name] = function
        return found
    except (OSError, AttributeError) as error:
        raise ToolchainError(f"cannot load compiled kernels: {error}") from error
