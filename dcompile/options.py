"""Per-compile options. This module is the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dcompile.errors import DCompileError

SHOWABLE = frozenset({"passes", "ir", "code", "verdicts", "memory", "timeline"})


def default_cache_dir() -> Path:
    """``$DCOMPILE_CACHE_DIR``, else ``$XDG_CACHE_HOME/dcompile``, else ``~/.cache/dcompile``."""
    if chosen := os.environ.get("DCOMPILE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcompile"


@dataclass(frozen=True)
class Options:
    """What a user can choose about a compile: what it produces, shows, waits for and where it keeps things.

    Attributes:
        eager_ops: ATen op names (``"aten.exp.default"`` or ``"exp"``) that stay library calls.
        skip: pass names of ``pipeline.PASSES`` to leave out (only passes marked optional).
        show: what to print to stderr while compiling; a subset of ``SHOWABLE``.
        dump_dir: folder that receives one sub-folder a rank with every stage as text; None for no dump.
        cache_dir: folder of compiled artifacts; None compiles into a private temporary folder.
        bucket_bytes: largest gradient bucket one all-reduce carries, in bytes; None lets the cost model choose.
        in_flight_bytes: most bytes of collectives in flight at once.
        peak_memory_bytes: most bytes a program may use, what it is given (parameters, saved values) included; of a
            training step that is everything but the optimizer's state. Buckets, how far gathers run ahead and which
            sharded parameters stay gathered for the backward pass follow it. None: about what program order needs.
        deadline_s: longest wait on another rank, in seconds.
        flight_dir: folder that receives each rank's flight recorder when a collective does not end; None for none.
        topology: TOML file with the prices that decisions are taken by (``analyse.topology``); None for built-in ones.
        progress_dir: folder in which each rank says what it is compiling, for the launcher; None for none.
        compile_once: one rank compiles a program and the others load it.
        verify_cross_rank: exchange plan fingerprints between ranks before the first launch.
        cxx: C++ compiler command; None searches ``$CXX``, ``g++``, ``clang++``.
        assert_layouts: the first call of a program checks what library calls return against what it was compiled for.
        tracebacks: keep the frames that led to each node, for errors and ``explain``.
        timeline: record start and end of every step at run time.
        freeze: weights of inference graphs rarely change: those of large CPU convolutions and linear layers are packed
            for oneDNN and MKL once, with elementwise epilogues inside the call, whose relu and clamps do not keep NaN.
        keep_memory: what a step of a CPU program frees stays with the process for the next one (glibc's allocator keeps
            up to 1 GiB at the end of the heap), unless the environment tunes the allocator already.
        autotune: measure other cuts of large GPU kernels while compiling and keep the fastest; results stay in
            ``cache_dir``. Takes about a second of one core for each variant, side by side.
        cuda_graphs: replay GPU programs as CUDA graphs where ``pipeline.graph_refusal`` names no reason against it.
    """

    eager_ops: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    show: frozenset[str] = frozenset()
    dump_dir: Path | None = None
    cache_dir: Path | None = None
    bucket_bytes: int | None = None
    in_flight_bytes: int = 256 * 2**20
    peak_memory_bytes: int | None = None
    deadline_s: float = 300.0
    flight_dir: Path | None = None
    topology: Path | None = None
    progress_dir: Path | None = None
    compile_once: bool = True
    verify_cross_rank: bool = True
    cxx: str | None = None
    timeline: bool = False
    assert_layouts: bool = True
    tracebacks: bool = False
    cuda_graphs: bool = False
    autotune: bool = False
    freeze: bool = False
    keep_memory: bool = True

    def __post_init__(self) -> None:
        """Raises ``DCompileError`` naming the option and the value it cannot have."""
        if unknown := self.show - SHOWABLE:
            raise DCompileError(f"cannot show {', '.join(sorted(unknown))}; choose from {', '.join(sorted(SHOWABLE))}")
        for name, least in (("bucket_bytes", 1), ("in_flight_bytes", 1), ("peak_memory_bytes", 1), ("deadline_s", 0)):
            value = getattr(self, name)
            if value is None and name in ("bucket_bytes", "peak_memory_bytes"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least or value != value:
                raise DCompileError(f"option {name}={value!r} must be a number of at least {least}")

    @staticmethod
    def from_env(overrides: Mapping[str, Any] | None = None) -> Options:
        """Options of the environment with ``overrides`` on top.

        The environment names them in capitals: ``DCOMPILE_SHOW=passes,ir``, ``DCOMPILE_SKIP=overlap``,
        ``DCOMPILE_BUCKET_BYTES=…``, and ``DCOMPILE_DUMP`` for ``dump_dir``.

        Raises:
            DCompileError: an unknown option name, or a value that cannot be read, naming both.
        """
        values: dict[str, Any] = {"cache_dir": default_cache_dir(), "cxx": os.environ.get("CXX") or None}
        for field in fields(Options):
            variable = "DCOMPILE_" + {"dump_dir": "DUMP"}.get(field.name, field.name.upper())
            text = os.environ.get(variable)
            if text is not None and field.name != "cache_dir":
                values[field.name] = _parse(field.name, text, variable)
        known = {field.name for field in fields(Options)}
        for name, value in (overrides or {}).items():
            if name not in known:
                raise DCompileError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}")
            values[name] = _typed(name, value)
        return replace(Options(), **values)

    def affects_code(self) -> tuple[object, ...]:
        """The part of the options that changes generated programs; part of every cache key."""
        flags = (self.assert_layouts, self.freeze, self.autotune)
        return (
            sorted(self.eager_ops),
            sorted(self.skip),
            self.bucket_bytes,
            self.in_flight_bytes,
            self.peak_memory_bytes,
            *flags,
        )


def _typed(name: str, value: Any) -> Any:
    """``value`` in the type of the option: any collection of names, any spelling of a path."""
    if name in ("eager_ops", "skip", "show"):
        return frozenset({value} if isinstance(value, str) else value)
    if name in ("cache_dir", "dump_dir", "flight_dir", "progress_dir", "topology"):
        return None if value is None else Path(value)
    return value


def _parse(name: str, text: str, variable: str) -> Any:
    try:
        if name in ("eager_ops", "skip", "show"):
            return frozenset(part.strip() for part in text.split(",") if part.strip())
        if name in ("dump_dir", "flight_dir", "progress_dir", "topology"):
            return Path(text)
        if name in ("bucket_bytes", "in_flight_bytes", "peak_memory_bytes"):
            return int(text)
        if name == "deadline_s":
            return float(text)
        if name in (
            "verify_cross_rank",
            "assert_layouts",
            "tracebacks",
            "timeline",
            "cuda_graphs",
            "autotune",
            "compile_once",
            "freeze",
            "keep_memory",
        ):
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return text
    except (ValueError, KeyError):
        raise DCompileError(f"environment variable {variable}={text!r} cannot be read") from None


ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def allocator_is_tuned() -> bool:
    """Whether the user has set thresholds of the C library's allocator."""
    return any(name in os.environ for name in ALLOCATOR_VARIABLES)


def process_life() -> str:
    """What tells the lives of a restarted job apart: restarts so far, and its ranks (torch's elastic agent sets both).

    Its store may outlive its ranks, with all that they wrote.
    """
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{os.environ.get('WORLD_SIZE', '1')}"


def process_rank() -> int:
    """This process's rank as its launcher states it (``$RANK``), 0 when it was started alone.

    For naming folders and choosing who prints; never for anything that decides what is compiled.
    """
    return int(os.environ.get("RANK", "0"))
