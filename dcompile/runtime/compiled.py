"""A compiled graph from cache entry to first call: its files, its loading, and the agreement of the ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dcompile.errors import DeadlineExceeded, Divergence, PeerGone, ToolchainError
from dcompile.options import Options, allocator_is_tuned
from dcompile.runtime.agree import agree_on
from dcompile.runtime.board import compiling
from dcompile.runtime.cache import Cache
from dcompile.runtime.comm import TorchComm
from dcompile.runtime.cuda_graphs import CudaGraphDevice, GraphedProgram
from dcompile.runtime.kept_memory import keep_freed_memory
from dcompile.runtime.last_words import end_with
from dcompile.runtime.once import Building, Place
from dcompile.runtime.ownership import Users
from dcompile.runtime.program import Executable
from dcompile.runtime.timeline import RECORDER
from dcompile.runtime.toolchain import Arity, compile_shared, load_functions
from dcompile.runtime.triton_kernels import GpuKernels, HasSignature, Tunes, compile_module

HOST, SOURCE, LIBRARY, FACTS = "host.py", "kernels.cpp", "kernels.so", "facts.json"


@dataclass(frozen=True)
class Facts:
    """What is known of a program without its plan.

    Attributes:
        functions: parameters of each C function.
        lines: the collectives in launch order, for ranks to compare (``collectives.fingerprint``).
        launches, library_calls, collectives: steps of one call.
        fallbacks: library calls made for want of a lowering rule, by op.
        gpu_functions: number of GPU kernels, which are described in the entry itself.
        graph_refusal: why the program cannot be a CUDA graph; "" if it can.
        written: positions of the inputs whose memory it writes.
    """

    functions: Mapping[str, Arity]
    lines: tuple[str, ...]
    launches: int
    library_calls: int
    collectives: int
    fallbacks: Counter[str]
    gpu_functions: int = 0
    graph_refusal: str = "not a GPU program"
    written: tuple[int, ...] = ()

    def to_json(self) -> str:
        functions = {name: [arity.buffers, arity.sizes] for name, arity in self.functions.items()}
        steps = [self.launches, self.library_calls, self.collectives, self.gpu_functions]
        parts = {"functions": functions, "lines": self.lines, "steps": steps, "fallbacks": self.fallbacks}
        return json.dumps({**parts, "graph_refusal": self.graph_refusal, "written": self.written})

    @staticmethod
    def from_json(text: str) -> Facts:
        found = json.loads(text)
        functions = {name: Arity(*arity) for name, arity in found["functions"].items()}
        launches, library_calls, collectives, gpu_functions = found["steps"]
        fallbacks = Counter(found["fallbacks"])
        return Facts(
            functions,
            tuple(found["lines"]),
            launches,
            library_calls,
            collectives,
            fallbacks,
            gpu_functions,
            found["graph_refusal"],
            tuple(found["written"]),
        )


def write_entry(folder: Path, host: str, source: str, facts: Facts, cxx: str | None) -> None:
    """Fill a cache entry: texts, facts, and the compiled kernels.

    Raises:
        ToolchainError: the C++ compiler failed.
    """
    (folder / HOST).write_text(host)
    (folder / FACTS).write_text(facts.to_json())
    if facts.functions:
        (folder / SOURCE).write_text(source)
        compile_shared(source, folder / LIBRARY, cxx)


def read_facts(entry: Path) -> Facts:
    return Facts.from_json((entry / FACTS).read_text())


def write_gpu_kernels(
    folder: Path, source: str, signatures: Mapping[str, HasSignature], tuner: Tunes | None = None
) -> None:
    """Add a printed Triton module to a cache entry, compiled for the current device; ``tuner`` chooses variants.

    Raises:
        ToolchainError: Triton is missing or rejects a kernel.
    """
    if signatures:
        compile_module(source, signatures, folder, tuner=tuner)


VANISHED = (OSError, ToolchainError)
"""What reading an entry raises when it is being removed."""


@dataclass(frozen=True)
class Loaded:
    """A cache entry in this process; from here on its files may vanish, but for those of GPU kernels."""

    folder: Path
    facts: Facts
    host: str
    functions: Mapping[str, Callable[..., int]]


def load_entry(entry: Path) -> Loaded:
    """Read an entry and map its library.

    Raises:
        OSError, ToolchainError: part of it has been removed, by an eviction for example (``VANISHED``).
    """
    facts = read_facts(entry)
    functions = load_functions(entry / LIBRARY, facts.functions) if facts.functions else {}
    return Loaded(entry, facts, (entry / HOST).read_text(), functions)


def fetch_and_load(cache: Cache, key: str, build: Callable[[Path], None]) -> Loaded:
    """The entry ``key``, built if it is not there, and once more if it vanishes before it is loaded."""
    entry = cache.fetch(key, build)
    try:
        return load_entry(entry)
    except VANISHED:
        return load_entry(cache.fetch(key, build))


def build_and_share(cache: Cache, key: str, build: Callable[[Path], None], sharing: Building | None) -> Loaded:
    """``fetch_and_load``, whose entry the ranks that wait for it get too."""
    loaded: Loaded | None = None
    try:
        loaded = fetch_and_load(cache, key, build)
        return loaded
    finally:
        if sharing is not None:
            sharing.finish(loaded.folder if loaded is not None else None)


def receive_or(
    place: Place,
    key: str,
    cache: Cache,
    deadline_s: float,
    arrived: Callable[[Facts], None],
    otherwise: Callable[[], Loaded],
) -> Future[Loaded]:
    """The program that another rank builds, or what ``otherwise`` compiles here if that fails.

    It has a thread of its own: in a pool, ranks that wait for each other's programs could fill the pool with waits.

    Args:
        arrived: told of a program that came from the other rank.
    """
    result: Future[Loaded] = Future()

    def get() -> Loaded:
        entry = place.receive(key, cache, deadline_s)
        if entry is not None:
            with contextlib.suppress(*VANISHED):
                loaded = load_entry(entry)
                arrived(loaded.facts)
                return loaded
        return otherwise()

    def main() -> None:
        try:
            result.set_result(get())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=main, name="dcompile-receive", daemon=True).start()
    return result


@lru_cache(maxsize=1)
def own_sources() -> str:
    """A digest of this package's files, so that a changed compiler does not meet old programs, nor other ranks."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.h"))):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def made_by() -> str:
    """The line of the compiler itself among those ranks compare."""
    return f"compiled by dcompile {own_sources()[:12]} with torch {torch.__version__}"


def settle(name: str, groups: Mapping[str, Any], lines: Sequence[str], options: Options) -> TorchComm | None:
    """The communicator of a program whose ranks have agreed on ``lines``; None for a program without collectives.

    Raises:
        Divergence: another rank launches something else.
        DeadlineExceeded: another rank does not come.
        PeerGone: another rank has ended.
        Unsupported: a group does not exist on this rank.
    """
    if not groups:
        return None
    communicator = TorchComm(groups, options.deadline_s, options.flight_dir)
    if options.verify_cross_rank:
        lines = (made_by(), *lines)
        try:
            agree_on(communicator.teams, name, fingerprint(lines), lines, options.deadline_s)
        except (Divergence, DeadlineExceeded, PeerGone) as error:
            raise end_with(error, options.flight_dir) from error.__cause__
    return communicator


def fingerprint(lines: Sequence[str]) -> str:
    """SHA-256 of the lines without their comments: equal on ranks that launch the same collectives."""
    return hashlib.sha256("\n".join(line.split("  # ")[0] for line in lines).encode()).hexdigest()


@dataclass(frozen=True)
class Graphing:
    """What replaying a program as CUDA graphs needs to know that the program itself does not tell.

    Attributes:
        returned: how many of its results, from the first, go to the user.
        users: how many hold a tensor's storage (``capture.storage_users``).
    """

    returned: int
    users: Callable[[torch.Tensor], int]


class CompiledGraph:
    """A program that is being built or is ready. The first call waits for the build, loads it and has the ranks agree.

    Args:
        name: of the graph.
        loaded: its cache entry, possibly still being built by another thread.
        groups: process group, or its name, of each group label.
        complete: appends to the inputs what the traced program leaves implicit (constants, sizes).
        graphing: replay it as CUDA graphs if it can be; None for the plain program.
        programs: the programs it calls.
        users: who holds a tensor (``capture.tensor_users``); None: nobody knows.
    """

    def __init__(
        self,
        name: str,
        loaded: Future[Loaded],
        groups: Mapping[str, Any],
        complete: Callable[[list[Any]], None],
        options: Options,
        graphing: Graphing | None = None,
        programs: Mapping[str, Callable[..., Any]] | None = None,
        users: Users | None = None,
    ) -> None:
        self.name = name
        self._programs = programs
        self._users = users
        self._loaded = loaded
        self._graphing = graphing
        self._groups = groups
        self._complete = complete
        self._options = options
        self._executable: Executable | GraphedProgram | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        """Run on ``inputs``, which is emptied."""
        executable = self._executable or self._load()
        self._complete(inputs)
        return executable(inputs)

    def _load(self) -> Executable | GraphedProgram:
        with self._lock:
            if self._executable is None:
                with compiling(self.name):
                    loaded = self._loaded.result()
                gpu = GpuKernels(loaded.folder, self.name) if loaded.facts.gpu_functions else None
                functions = {**loaded.functions, **gpu.functions} if gpu is not None else loaded.functions
                communicator = settle(self.name, self._groups, loaded.facts.lines, self._options)
                recorder = RECORDER if self._options.timeline else None
                plain = Executable(
                    loaded.host, self.name, functions, communicator, recorder, gpu, self._programs, self._users
                )
                if gpu is None and self._options.keep_memory and not allocator_is_tuned():
                    keep_freed_memory()
                self._executable = self._graphed(plain, loaded.facts, gpu) or plain
            return self._executable

    def _graphed(self, plain: Executable, facts: Facts, gpu: GpuKernels | None) -> GraphedProgram | None:
        if self._graphing is None or facts.graph_refusal or self._options.timeline:
            return None
        return GraphedProgram(
            plain,
            self.name,
            written=frozenset(facts.written),
            returned=self._graphing.returned,
            users=self._graphing.users,
            device=CudaGraphDevice(),
            poll=gpu.poll if gpu is not None else lambda: None,
            captured=plain.release,
        )
