"""The finished program: generated host source, loaded and callable."""

from __future__ import annotations

import ctypes
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dcompile.errors import CompilerBug, DividedByZero, OutOfRange
from dcompile.runtime.arena import Arena, Block, alias
from dcompile.runtime.comm import Communicator, Handle
from dcompile.runtime.externs import check_number, check_result, leaves, resolve_op
from dcompile.runtime.inputs import Layout as InputLayout
from dcompile.runtime.inputs import conform, fits
from dcompile.runtime.ownership import Users, holders, only_here
from dcompile.runtime.timeline import Clock, Recorder
from dcompile.runtime.triton_kernels import GpuKernels


class Runtime:
    """What a host program sees under the name ``rt``. One for each executable.

    Args:
        name: of the program, for messages.
        functions: functions of the kernels, by symbol.
        communicator: collectives; None for a program without any.
        recorder: receives step times; None records nothing.
        gpu: the loaded GPU kernels, if the program has any; their functions are among ``functions``.
        programs: what the program calls besides kernels and ops: branches, loop bodies.
        users: who holds a tensor (``capture.tensor_users``); None: nobody knows, so no input is taken.
    """

    alias = staticmethod(alias)
    op = staticmethod(resolve_op)
    Layout = InputLayout
    fits = staticmethod(fits)
    threads = staticmethod(torch.get_num_threads)

    def __init__(
        self,
        name: str,
        functions: Mapping[str, Callable[..., int]],
        communicator: Communicator | None = None,
        recorder: Recorder | None = None,
        gpu: GpuKernels | None = None,
        programs: Mapping[str, Callable[..., Any]] | None = None,
        users: Users | None = None,
    ) -> None:
        self.name = name
        self._programs = programs or {}
        self._users = users
        self._functions = functions
        self._communicator = communicator
        self._recorder = recorder
        self._gpu = gpu
        self._seen: set[object] = set()

    def kernel(self, symbol: str) -> Callable[..., int]:
        """The function of that name."""
        found = self._functions.get(symbol)
        if found is None:
            raise CompilerBug(f"{self.name}: the compiled kernels have no function {symbol}")
        return found

    def program(self, name: str) -> Callable[..., Any]:
        """The program of that name that this one calls."""
        found = self._programs.get(name)
        if found is None:
            raise CompilerBug(f"{self.name} calls {name}, which it was loaded without")
        return found

    def stream(self, device: torch.device) -> ctypes.c_void_p:
        """Where this call launches GPU kernels; see ``GpuKernels.stream``."""
        if self._gpu is None:
            raise CompilerBug(f"{self.name} launches GPU kernels but was loaded without any")
        return self._gpu.stream(device)

    @property
    def comm(self) -> Communicator:
        """Where the program starts and waits for collectives."""
        if self._communicator is None:
            raise CompilerBug(f"{self.name} contains collectives but was loaded without a communicator")
        return self._communicator

    def arena(
        self,
        nbytes: Mapping[str, int],
        views: Callable[[Block], tuple[torch.Tensor, ...]],
        shared: Mapping[str, str] | None = None,
    ) -> Arena:
        """The program's working memory; ``shared``: for pieces that a group's ranks map the label of the group."""
        return Arena(nbytes, views, {name: partial(self.comm.share, label) for name, label in (shared or {}).items()})

    def conform(
        self, tensors: Sequence[torch.Tensor], layouts: Sequence[InputLayout], shapes: Sequence[tuple[Any, Any]]
    ) -> tuple[torch.Tensor, ...]:
        """See ``inputs.conform``."""
        return conform(tensors, layouts, shapes, self.name)

    def first(
        self, tensors: Sequence[torch.Tensor], layouts: Sequence[InputLayout], shapes: Any, sizes: object
    ) -> bool:
        """Whether no call with these sizes has ended yet: then inputs and library results are checked thoroughly."""
        if sizes in self._seen:
            return False
        conform(tensors, layouts, shapes, self.name)
        return True

    def checked(self, sizes: object) -> None:
        """A call with these sizes has passed every check."""
        self._seen.add(sizes)

    def take(self, tensor: torch.Tensor, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a result: that of ``tensor``, an input that dies, if only the program holds it; else new memory.

        While a CUDA graph is captured nobody knows who will hold the input when it is replayed.
        """
        capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._users is not None and not capturing and holders(tensor, self._users) == only_here(self._users):
            return alias(tensor, 0, shape, stride, dtype)
        return torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device)

    leaves = staticmethod(leaves)

    def check_number(self, result: object, promised: object, call: str) -> None:
        """See ``externs.check_number``."""
        check_number(result, promised, f"{self.name}: {call}")

    def expect(
        self, result: torch.Tensor, dtype: torch.dtype, shape: Any, stride: Any, call: str, address: int | None = None
    ) -> None:
        """See ``externs.check_result``."""
        check_result(result, dtype, shape, stride, f"{self.name}: {call}", address)

    def fault(self, code: int, where: str) -> None:
        """Raise what the return code of a kernel says; ``where`` names its ops and source line.

        Raises:
            IndexError: code 1. ZeroDivisionError: code 2. CompilerBug: any other.
        """
        if code == 1:
            raise OutOfRange(f"index out of range in {where}")
        if code == 2:
            raise DividedByZero(f"integer division by zero in {where}")
        raise CompilerBug(f"{self.name}: kernel of {where} returned {code}")

    def abandon(self, arena: Arena | None, block: Block | None, handles: Iterable[Handle | None]) -> None:
        """Called while an exception leaves the program: end what is in flight, then give the block back.

        A block that a collective may still write to is not used again.
        """
        patient = isinstance(sys.exception(), Exception)
        flying = tuple(handles)
        settled = not flying or self.comm.drain(flying, patient)
        if settled and arena is not None and block is not None:
            arena.give(block)

    def clock(self, steps: Sequence[tuple[str, str]]) -> Clock:
        """Starts recording one call; ``steps`` are (name, lane)."""
        if self._recorder is None:
            raise CompilerBug(f"{self.name} was printed with a timeline but loaded without a recorder")
        return self._recorder.begin(self.name, steps)


class Executable:
    """A callable program.

    Args:
        source: text of the host program (``codegen.wrapper.print_host``).
        name: of the program; shown in messages and tracebacks.
        functions: functions of the kernels, by symbol.
        communicator, gpu, programs, users: see ``Runtime``.
        recorder: see ``Runtime``; needed iff the source was printed with a timeline.
    """

    def __init__(
        self,
        source: str,
        name: str,
        functions: Mapping[str, Callable[..., int]],
        communicator: Communicator | None = None,
        recorder: Recorder | None = None,
        gpu: GpuKernels | None = None,
        programs: Mapping[str, Callable[..., Any]] | None = None,
        users: Users | None = None,
    ) -> None:
        self.source = source
        self.name = name
        self.runtime = Runtime(name, functions, communicator, recorder, gpu, programs, users)
        filename = f"<dcompile {name} {id(self):x}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        self._filename = filename
        namespace: dict[str, Any] = {"rt": self.runtime, "__name__": f"dcompile_{name}"}
        exec(compile(source, filename, "exec"), namespace)
        self.run: Callable[[list[Any]], list[Any]] = namespace["call"]
        self._arena: Arena | None = namespace.get("arena")

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Run the program.

        Args:
            inputs: tensors and integers in the graph's order; the list is emptied, so that inputs can be freed early.

        Returns:
            The graph's outputs in order.

        Raises:
            DCompileError: inputs the program was not compiled for, or a failed collective.
            IndexError, ZeroDivisionError: from the user's program.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(inputs)
        return self.run(inputs)

    def release(self) -> None:
        """Give working memory that the current stream's calls have used back to the allocator."""
        if self._arena is not None and torch.cuda.is_available():
            self._arena.release(torch.device("cuda", torch.cuda.current_device()))

    def __del__(self) -> None:
        linecache.cache.pop(getattr(self, "_filename", ""), None)
