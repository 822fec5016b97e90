"""What AOTAutograd found out about a graph, kept on disk: later processes skip tracing, partition and lowering.

An entry says how the compiled programs are called (which inputs are written, which outputs alias which inputs, what is
saved for the backward program) and names the programs. Its key is all that AOTAutograd and the compiler look at
(``capture.identity``). A graph for which that cannot be said has no entry, and the reason is counted.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import _dynamo, fx
from torch._functorch._aot_autograd import runtime_wrappers
from torch._functorch._aot_autograd.schemas import AOTConfig, MutationType
from torch._functorch.aot_autograd import AOT_COUNTER
from torch._guards import TracingContext

from dcompile.capture.identity import Unsuited, storage_number
from dcompile.capture.outputs import outputs_of

Boxed = Callable[[list[Any]], Sequence[Any]]
"""A compiled graph. It takes all inputs in one list and clears it, so that each can be freed after its last use."""

VERSION = 1


def boxed(compiled: Boxed) -> Boxed:
    """``compiled`` with the mark by which AOTAutograd knows that it takes a list."""

    def call(inputs: list[Any]) -> Sequence[Any]:
        return compiled(inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


class Memory(Protocol):
    """Where entries are, and the programs they name."""

    @property
    def salt(self) -> str:
        """All that compiled programs depend on beside the graph: options, versions, compilers."""

    def group_size(self, name: str) -> int | None:
        """How many ranks are in the process group of that name; None if there is none."""

    def find(self, key: str) -> bytes | None:
        """The entry of that key."""

    def keep(self, key: str, entry: bytes | None, programs: Sequence[Boxed]) -> None:
        """Store an entry as soon as its ``programs`` are built; None: there is none for this key."""

    def reference(self, program: Boxed) -> Any:
        """What names a compiled program, to be pickled.

        Raises:
            Unsuited: it can only be had by compiling the graph.
        """

    def program(self, reference: Any, name: str) -> Boxed | None:
        """The program of that reference; None if it is gone or would be another one today."""


@dataclass
class Recording:
    """What is seen of one graph on its way through AOTAutograd.

    Attributes:
        programs: compiled ones, by kind.
        metadata: how they are called (``ViewAndMutationMeta``).
        without_gradient: positions of the inputs that get no gradient.
        refusal: why there is no entry; "" if there is one.
    """

    programs: dict[str, Boxed] = field(default_factory=dict)
    metadata: Any = None
    without_gradient: frozenset[int] = frozenset()
    refusal: str = ""

    def saw(self, kind: str, program: Boxed, wrapped: bool) -> None:
        """A graph was compiled; ``wrapped``: what calls it is more than the program."""
        self.programs[kind] = program
        if wrapped:
            self.refusal = "Python objects go around the program"
        if kind != "backward":
            context = TracingContext.try_get()  # there is none outside torch.compile
            self.metadata = None if context is None else context.fw_metadata
            if self.metadata is not None:
                self.metadata.bw_donated_idxs = []  # what is saved is autograd's, so that a graph can be retained

    def entry(self, inputs: Sequence[Any], memory: Memory) -> bytes:
        """The entry.

        Raises:
            Unsuited: there can be none.
        """
        if self.refusal:
            raise Unsuited(self.refusal)
        if set(self.programs) not in ({"inference"}, {"forward", "backward"}):
            raise Unsuited("not all of its programs were compiled at once")
        _check(self.metadata, inputs)
        parts = {
            "version": VERSION,
            "programs": {kind: memory.reference(program) for kind, program in self.programs.items()},
            "metadata": self.metadata,
            "detached": _detached(self.metadata, self.without_gradient),
        }
        try:
            return pickle.dumps(parts)
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
            raise Unsuited("its description cannot be stored") from error


def inputs_without_gradient(backward: fx.GraphModule) -> frozenset[int]:
    """Positions of the inputs for which a traced backward graph returns None."""
    return frozenset(place for place, result in enumerate(outputs_of(backward)) if result is None)


def _check(metadata: Any, inputs: Sequence[Any]) -> None:
    if metadata is None:
        raise Unsuited("AOTAutograd does not say how its programs are called")
    if metadata.tokens or metadata.num_backward_tokens or metadata.num_outputs_rng_offset:
        raise Unsuited("effects in order, or a random state that is passed along")
    if len(metadata.input_info) != len(inputs):
        raise Unsuited("inputs that AOTAutograd has replaced")
    numbers = [storage_number(item) for item in inputs]
    for number, info in zip(numbers, metadata.input_info, strict=True):
        if info.mutation_type is not MutationType.NOT_MUTATED and numbers.count(number) > 1:
            raise Unsuited("a written input that shares its memory with another")


def _detached(metadata: Any, without_gradient: frozenset[int]) -> list[int]:
    """Inputs cut off from autograd: they are results of other nodes, and nothing flows back to them."""
    found = []
    for place, info in enumerate(metadata.input_info):
        is_reset = info.mutation_type is MutationType.MUTATED_IN_GRAPH and info.mutates_storage_metadata
        if place in without_gradient and info.requires_grad and not info.is_leaf and not is_reset:
            found.append(place)
    return found


def recall(content: bytes, memory: Memory, number: int) -> Callable[..., Any] | None:
    """The function that ``capture`` would return, from an entry; None if it is of no use any more."""
    try:
        parts: Mapping[str, Any] = pickle.loads(content)
        if parts["version"] != VERSION:
            return None
        programs: dict[str, Boxed] = {}
        for kind, reference in parts["programs"].items():
            program = memory.program(reference, f"{kind}{number}")
            if program is None:
                return None
            programs[kind] = boxed(program)
        compiled = _wrapped(programs, parts["metadata"], parts["detached"])
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ImportError, ValueError):
        return None

    def call(*arguments: Any) -> Any:
        return compiled(list(arguments))

    function: Callable[..., Any] = _untraced(call)
    return function


def _untraced(function: Callable[..., Any]) -> Any:
    """``function``, which Dynamo leaves alone."""
    leave: Any = _dynamo.disable
    return leave(function, reason="compiled by dcompile")


def _wrapped(programs: Mapping[str, Boxed], metadata: Any, detached: list[int]) -> Callable[[list[Any]], Any]:
    """What PyTorch puts around compiled programs: autograd, writes to inputs, views as outputs."""
    known = {item.name for item in fields(AOTConfig)}
    given = dict.fromkeys(("fw_compiler", "bw_compiler", "partition_fn", "decompositions"))
    values = {**given, "num_params_buffers": 0, "aot_id": next(AOT_COUNTER), "keep_inference_input_mutations": True}
    make: Any = AOTConfig
    config = make(**{name: value for name, value in values.items() if name in known})
    autocast = torch._C._is_any_autocast_enabled()
    if "inference" in programs:
        around: Any = runtime_wrappers.RuntimeWrapper(
            indices_of_inps_to_detach=[], trace_joint=False, disable_amp=autocast
        )
        return around.post_compile(programs["inference"], config, runtime_metadata=metadata)  # type: ignore[no-any-return]
    backward = _untraced(programs["backward"])
    described = {
        "compiled_fw_func": programs["forward"],
        "compiled_bw_func": backward,
        "maybe_subclass_meta": None,
        "num_symints_saved_for_bw": 0,
        "backward_state_indices": [],
        "disable_amp": autocast,
        "indices_of_inps_to_detach": detached,
        "lazy_backward_info": None,
    }
    together: Any = getattr(runtime_wrappers, "AOTDispatchAutogradCompileSpec", None)
    finish: Any = runtime_wrappers.AOTDispatchAutograd.post_compile
    if together is None:  # before torch 2.13
        return finish(*described.values(), config, fw_metadata=metadata, try_save_cache_entry=None)  # type: ignore[no-any-return]
    rest = {"bw_compiler": None, "aot_config": config, "fw_metadata": metadata, "try_save_cache_entry": None}
    return finish(together(**described, **rest))  # type: ignore[no-any-return]
