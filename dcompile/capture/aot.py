"""From Dynamo's graph to plain ATen graphs: the body of a ``torch.compile`` backend."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

from dcompile.capture.channels_last import prefer_channels_last
from dcompile.capture.check import check
from dcompile.capture.comm import actions_have_effects
from dcompile.capture.decompositions import decompositions
from dcompile.capture.fewer_collectives import gather_once, move_blocks
from dcompile.capture.functional import functionalise_collectives
from dcompile.capture.identity import Unsuited, identity
from dcompile.capture.in_place import write_in_place
from dcompile.capture.interpolation import whole_gradients
from dcompile.capture.listings import print_on_demand
from dcompile.capture.memory import Boxed, Memory, Recording, boxed, inputs_without_gradient, recall
from dcompile.capture.normalise import drop_idle_waits, normalise
from dcompile.capture.opaque import lift_opaque
from dcompile.capture.origins import mark_sources
from dcompile.capture.partition import RETURNED, partition
from dcompile.capture.regather import gather_before_use
from dcompile.capture.rejections import reject
from dcompile.capture.user_kernels import attach_kernels
from dcompile.counters import TALLY

GraphKind = Literal["inference", "forward", "backward"]


@dataclass(frozen=True)
class Captured:
    """One graph to compile.

    Attributes:
        kind: which half of a training step, or a program that needs no gradients.
        gm: functional ATen ops, ``wait_tensor`` and functional collectives; every node has ``meta["val"]`` and, where
            known, ``meta["dcompile_source"]``. Mutations of inputs stand at the end as ``aten.copy_``.
        example_inputs: one fake tensor or SymInt for each placeholder of ``gm``.
        name: unique in this process, ``"forward1"``; equal on ranks that capture the same programs in the same order.
        returned: how many of the outputs, from the first, go to the user; the rest is saved for the backward graph.
    """

    kind: GraphKind
    gm: fx.GraphModule
    example_inputs: list[Any]
    name: str
    returned: int = 0


CompileGraph = Callable[[Captured], Boxed]

_numbers = itertools.count()

_SETTINGS: dict[str, Any] = {
    "donated_buffer": False,  # what is saved is autograd's, so that a graph can be retained
    "unlift_effect_tokens": True,
    "force_non_lazy_backward_lowering": True,  # while the C++ compiler is busy with the forward program
}


def capture(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph, memory: Memory | None = None
) -> Callable[..., Any]:
    """Trace ``gm`` through AOTAutograd and have ``compile_graph`` compile what comes out.

    Args:
        gm: the graph Dynamo hands to a backend.
        example_inputs: its inputs, fake tensors and SymInts.
        compile_graph: called once for an inference graph, or for a forward and a backward graph of the same number.
        memory: of graphs that were captured before; None to capture anew.

    Returns:
        The function Dynamo calls in place of ``gm``.

    Raises:
        Unsupported: a dtype, device or tensor layout the compiler has no place for, with the user's line.
    """
    number = next(_numbers)
    print_on_demand()
    reject(gm)
    functionalise_collectives(gm)
    prefer_channels_last(gm, example_inputs)
    if memory is None:
        return _trace(gm, example_inputs, compile_graph, number, Recording())
    try:
        key = identity(gm, example_inputs, memory.salt, memory.group_size)
    except Unsuited as reason:
        TALLY.add_refusal(str(reason))
        return _trace(gm, example_inputs, compile_graph, number, Recording())
    content = memory.find(key)
    if content is not None and (found := recall(content, memory, number)) is not None:
        TALLY.add(captures_recalled=1)
        return found
    entry: bytes | None = None
    recording = Recording()
    try:
        function = _trace(gm, example_inputs, compile_graph, number, recording)
        entry = recording.entry(example_inputs, memory)
    except Unsuited as reason:
        TALLY.add_refusal(str(reason))
    finally:
        memory.keep(key, entry, tuple(recording.programs.values()))
    return function


def _trace(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph, number: int, recording: Recording
) -> Callable[..., Any]:
    """The function of ``gm``, by AOTAutograd."""

    def compiler(kind: GraphKind) -> Callable[[fx.GraphModule, Sequence[Any]], Boxed]:
        def compile_one(traced: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
            if kind == "backward":
                recording.without_gradient = inputs_without_gradient(traced)
            left, around, lifted = _simplify(traced, list(inputs))
            captured = Captured(kind, traced, left, f"{kind}{number}", returned(traced, kind, lifted))
            program = compile_graph(captured)
            recording.saw(kind, program, wrapped=len(left) < len(inputs) or bool(lifted))
            return boxed(around(program))

        return compile_one

    with functorch_config.patch(**_SETTINGS), actions_have_effects(gm), whole_gradients():
        return aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"),
            decompositions=decompositions(),
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )(gm, list(example_inputs))


def _simplify(traced: fx.GraphModule, inputs: list[Any]) -> tuple[list[Any], Callable[[Boxed], Boxed], tuple[int, ...]]:
    """Bring a traced graph into the form that is compiled, in place; what is left of it as in ``lift_opaque``."""
    for inner in programs(traced):
        attach_kernels(inner)
    for inner in programs(traced)[:-1]:
        mark_sources(inner)
        normalise(inner)
        check(inner)
    mark_sources(traced)
    gather_before_use(traced)
    gather_once(traced)
    move_blocks(traced)
    drop_idle_waits(traced)
    write_in_place(traced)
    normalise(traced)
    left = lift_opaque(traced, inputs)
    check(traced)
    return left


def returned(traced: fx.GraphModule, kind: GraphKind, lifted: Sequence[int] = ()) -> int:
    """How many outputs of a graph go to the user: all of an inference graph, none, but gradients, of a backward.

    ``lifted``: positions of outputs the graph no longer has."""
    if kind == "inference":
        return len(traced.graph.find_nodes(op="output")[0].args[0])  # type: ignore[arg-type]
    if kind == "backward":
        return 0
    first = int(traced.meta.get(RETURNED, 0))
    return first - sum(place < first for place in lifted)


def programs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """``gm`` and the programs inside it that its conditionals and loops run, the innermost first."""
    found = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return found[::-1]


def graph_breaks() -> int:
    """Graph breaks Dynamo has counted since the process started or ``reset_graph_breaks`` was called."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def reset_graph_breaks() -> None:
    """Count graph breaks from zero."""
    torch._dynamo.utils.counters["graph_break"].clear()


@contextmanager
def every_recompile() -> Iterator[None]:
    """Dynamo compiles a function again however often it has been compiled, instead of falling back to eager."""
    with torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        yield


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, model outputs included."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
