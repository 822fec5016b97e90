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
from functools import lru_cache
from pathlib import Path
from typing import Protocol

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


class HasArity(Protocol):
    """Parameters of a kernel function: pointers, then int64 sizes, then the int64 thread count."""

    @property
    def buffers(self) -> int: ...
    @property
    def sizes(self) -> int: ...


def find_compiler(cxx: str | None = None) -> tuple[str, ...]:
    """The compiler command as a list of words: ``cxx``, else the first of ``g++``, ``clang++``, ``c++`` on the path.

    Raises:
        ToolchainError: there is none; the message says how to install one.
    """
    if cxx:
        words = tuple(shlex.split(cxx))
        if words and shutil.which(words[0]):
            return words
        raise ToolchainError(f"the C++ compiler {cxx!r} is not on the path. Instead: {_HOW_TO_INSTALL}")
    for name in CANDIDATES:
        if found := shutil.which(name):
            return (found,)
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


class Compilation:
    """A running compiler. ``result()`` waits for it; dropping the object stops it."""

    def __init__(self, source: str, out: Path, cxx: str | None = None) -> None:
        self._out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="dcompile-", dir=out.parent)
        folder = Path(self._folder.name)
        self._log = folder / "log.txt"
        self._made = folder / "kernels.so"
        text = folder / "kernels.cpp"
        text.write_text(source)
        self._command = command(text, self._made, cxx)
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=_environment(folder),
                )
            except OSError as error:
                raise ToolchainError(f"cannot run {shlex.join(self._command)}: {error}") from error

    def done(self) -> bool:
        """Whether the compiler has finished."""
        return self._process.poll() is not None

    def result(self) -> Path:
        """The finished library, put in place by an atomic rename.

        Raises:
            ToolchainError: the compiler failed; carries the command and the end of its output.
        """
        if not self._made.parent.exists():
            return self._out
        status = self._process.wait()
        if status != 0:
            lines = self._log.read_text(errors="replace").splitlines()
            shown = "\n".join(lines[:OUTPUT_LINES])
            self._folder.cleanup()
            raise ToolchainError(f"the C++ compiler failed with status {status}\n{shlex.join(self._command)}\n{shown}")
        os.replace(self._made, self._out)
        self._folder.cleanup()
        return self._out

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def compile_async(source: str, out: Path, cxx: str | None = None) -> Compilation:
    """Start compiling C++ text to the shared library ``out``.

    Raises:
        ToolchainError: no compiler.
    """
    return Compilation(source, out, cxx)


def compile_shared(source: str, out: Path, cxx: str | None = None) -> None:
    """Compile C++ text to the shared library ``out``.

    Raises:
        ToolchainError: no compiler, or it rejects the text.
    """
    compile_async(source, out, cxx).result()


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}


@lru_cache(maxsize=8)
def compiler_fingerprint(cxx: str | None = None) -> str:
    """A short hash of what decides the machine code: compiler version, flags, the CPU features of ``-march=native``.

    Raises:
        ToolchainError: no compiler, or it does not run.
    """
    words = find_compiler(cxx)
    parts = [" ".join(FLAGS), str(openmp_library() or "")]
    for probe in (("--version",), ("-march=native", "-E", "-dM", "-x", "c++", os.devnull)):
        done = subprocess.run((*words, *probe), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise ToolchainError(f"{shlex.join((*words, *probe))} failed: {done.stderr.strip()}")
        parts.append(done.stdout)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_functions(path: Path, signatures: Mapping[str, HasArity]) -> dict[str, Callable[..., int]]:
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
