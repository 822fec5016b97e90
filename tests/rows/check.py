"""What the tests of rows share: compile, compare with eager, and look at the program that came out.

Vocabulary: K is the number of generated kernels that one call launches, X the number of library calls, CODE the
generated texts, SCHED the steps in execution order, MEM what happens to memory in that order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dcompile
from dcompile.analyse.alias import storage_roots
from dcompile.backend import backend
from dcompile.capture import tensors_in
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, View
from dcompile.ir.symbolic import is_library_call
from dcompile.ir.types import Value
from dcompile.options import Options
from dcompile.pipeline import Built
from dcompile.plan import Home, Plan


@dataclass(frozen=True)
class Step:
    """One step of the schedule.

    Attributes:
        kind: ``"kernel"``, ``"extern"``, ``"view"``, ``"pack"``, ``"start"`` or ``"wait"``.
        ops: the source ops it does the work of; for a library call also the op it calls.
        reads, makes, mutates: names of values.
        aliases: results that share the storage of something that was there before.
    """

    position: int
    kind: str
    ops: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    mutates: tuple[str, ...]
    aliases: tuple[str, ...]
    node: Node


@dataclass(frozen=True)
class MemoryEvent:
    """Something that happens to a storage at a step.

    Attributes:
        what: ``"allocate"`` (memory of its own), ``"reuse"`` (arena bytes another storage had before), ``"library"``
            (comes from a library call), ``"take"`` (a result written over the operand it replaces) or ``"free"``
            (after the step; arena bytes may be used again).
        name: of the storage; for ``"take"`` of the result.
    """

    position: int
    what: str
    name: str
    home: Home


def schedule(graph: Graph) -> tuple[Step, ...]:
    """SCHED of an ordered graph."""
    roots = storage_roots(graph)
    steps = []
    for position, node in enumerate(graph.nodes):
        makes = tuple(item.name for item in node.defs)
        ops = (*node.origin.ops, *((node.op,) if isinstance(node, Extern) else ()))
        shared = tuple(name for name in makes if name in roots and roots[name] != name)
        kind = type(node).__name__.lower()
        steps.append(Step(position, kind, tuple(dict.fromkeys(ops)), node.operands, makes, node.mutates, shared, node))
    return tuple(steps)


def memory(plan: Plan) -> tuple[MemoryEvent, ...]:
    """MEM of a plan; inputs have no events."""
    graph, slots = plan.graph, plan.slots
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        names = [*node.operands, *(item.name for item in node.defs)]
        for storage in {slots[name].storage for name in names if name in slots}:
            first.setdefault(storage, position)
            last[storage] = position
    for name in graph.output_names:
        last[slots[name].storage] = len(graph.nodes)
    events: list[MemoryEvent] = []
    for position, node in enumerate(graph.nodes):
        for storage in sorted(name for name, at in first.items() if at == position):
            home = plan.storages[storage].home
            if home is not Home.INPUT:
                events.append(MemoryEvent(position, _arrival(plan, storage, position, first), storage, home))
        if isinstance(node, Kernel):
            taken = {slots[operand].storage for _, operand in node.inplace}
            for out in node.outs:
                where = slots[out.name].storage
                if where in taken and first[where] < position and not node.targets:
                    events.append(MemoryEvent(position, "take", out.name, plan.storages[where].home))
        for storage in sorted(name for name, at in last.items() if at == position):
            if (home := plan.storages[storage].home) is not Home.INPUT:
                events.append(MemoryEvent(position, "free", storage, home))
    return tuple(events)


def _arrival(plan: Plan, name: str, position: int, first: dict[str, int]) -> str:
    storage = plan.storages[name]
    if storage.home is Home.LIBRARY:
        return "library"
    if storage.home is Home.ARENA and storage.arena_offset is not None:
        start, stop = storage.arena_offset, storage.arena_offset + int(storage.nbytes)
        for other in plan.storages.values():
            if (
                other.arena_offset is None
                or other.device != storage.device
                or first.get(other.name, position) >= position
            ):
                continue
            if other.arena_offset < stop and start < other.arena_offset + int(other.nbytes):
                return "reuse"
    return "allocate"


@dataclass(frozen=True)
class Seen:
    """A function that was compiled, run, and found equal to eager.

    Attributes:
        result: what the compiled function returned the first time.
        arguments: its arguments afterwards.
        graphs: everything that was compiled, in that order.
    """

    result: Any
    arguments: tuple[Any, ...]
    graphs: tuple[Built, ...]

    @property
    def plan(self) -> Plan:
        """The plan of the only graph, or of the first."""
        plan = self.graphs[0].plan
        assert plan is not None, self.graphs[0].op_by_op
        return plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(built.plan for built in self.graphs if built.plan is not None)

    @property
    def K(self) -> int:
        """Kernels launched by one call of every graph; a kernel without elements is not launched."""
        return sum(
            isinstance(node, Kernel) and any(out.numel != 0 for out in node.outs)
            for p in self.plans
            for node in p.graph.nodes
        )

    @property
    def X(self) -> int:
        """Library calls of one call of every graph."""
        return len(self.externs)

    @property
    def externs(self) -> tuple[str, ...]:
        """Ops called in the library; a check of a number is none, nor is the look-up of a packed weight."""
        return tuple(node.op for p in self.plans for node in p.graph.nodes if is_library_call(node))

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Those of them that have no lowering rule."""
        return tuple(n.op for p in self.plans for n in p.graph.nodes if isinstance(n, Extern) and n.fallback)

    @property
    def host(self) -> str:
        """The host programs."""
        return "\n".join(built.host for built in self.graphs)

    @property
    def code(self) -> str:
        """CODE: kernels and host programs, without the fixed helper functions before the kernels."""
        return "\n".join((*map(kernel_text, self.graphs), self.host))

    @property
    def schedule(self) -> tuple[Step, ...]:
        """SCHED of the only graph, or of the first."""
        return schedule(self.plan.graph)

    @property
    def memory(self) -> tuple[MemoryEvent, ...]:
        """MEM of the only graph, or of the first."""
        return memory(self.plan)

    @property
    def copies(self) -> int:
        """Copies the host programs make from one place to another."""
        return self.host.count(".copy_(")

    def at(self, op: str) -> int:
        """Position of the one step that does ``op`` (part of its name)."""
        (found,) = [
            step.position for step in self.schedule if any(op in name for name in step.ops) and step.kind != "view"
        ]
        return found


def kernel_text(built: Built) -> str:
    """The C++ kernels of a graph, each from its comment on."""
    source = built.kernels.source if built.kernels is not None else ""
    at = source.find('extern "C"')
    return source[source.rfind("\n}", 0, at) + 2 :] if at >= 0 else ""


def chk(
    function: Callable[..., Any],
    *args: Any,
    also: Sequence[tuple[Any, ...]] = (),
    grad: bool = False,
    dynamic: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    storage: bool = True,
    seed: int | None = None,
    **options: Any,
) -> Seen:
    """Compiled equals eager: values, dtypes, shapes, NaN places, strides, which tensors share storage, and what is left
    in the arguments.

    Args:
        also: further argument lists for the same compiled function.
        grad: gradients of all floating arguments that require one are compared too, for random output gradients.
        dynamic: as in ``torch.compile``.
        storage: compare which of the arguments and results share memory, and how far apart they begin in it.
        seed: set with ``torch.manual_seed`` before each call.
        options: fields of ``dcompile.Options``.
    """
    torch.compiler.reset()
    seen: list[Built] = []
    chosen = Options.from_env({"cache_dir": None, **options})
    compiled = torch.compile(function, backend=backend(chosen, seen.append), dynamic=dynamic)
    first: tuple[Any, tuple[Any, ...]] | None = None
    for given in (args, *also):
        theirs, mine = _twins(given)
        want = _run(function, theirs, seed, grad)
        have = _run(compiled, mine, seed, grad)
        same(have, want, rtol, atol)
        if storage:
            assert sharing(have[:2]) == sharing(want[:2]), "results and arguments share memory differently"
        first = first or (have[0], mine)
    assert first is not None
    return Seen(*first, tuple(seen))


def _twins(given: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return copy.deepcopy(given), copy.deepcopy(given)


def _run(
    function: Callable[..., Any], given: tuple[Any, ...], seed: int | None, grad: bool
) -> tuple[Any, Any, list[Tensor | None]]:
    """Result, arguments afterwards, gradients."""
    if seed is not None:
        torch.manual_seed(seed)
    result = function(*given)
    gradients: list[Tensor | None] = []
    if grad:
        outs = [t for t in tensors_in(result) if t.requires_grad]
        ins = [t for t in tensors_in(given) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outs]
        gradients = list(torch.autograd.grad(outs, ins, weights, allow_unused=True))
    return result, given, gradients


def same(have: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Equal trees; tensors up to rounding, with dtype, shape and strides, NaN in the same places."""
    if isinstance(want, Tensor):
        assert isinstance(have, Tensor), f"{type(have).__name__} instead of a tensor"
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        assert (have.untyped_storage().nbytes() == 0) == (want.untyped_storage().nbytes() == 0)
        if want.untyped_storage().nbytes() == 0:  # given up, or empty
            return
        if want.numel():
            assert seen_stride(have) == seen_stride(want)
        exact = not (want.dtype.is_floating_point or want.dtype.is_complex)
        tolerance = (0.0, 0.0) if exact else (rtol, atol)
        torch.testing.assert_close(have.detach(), want.detach(), rtol=tolerance[0], atol=tolerance[1], equal_nan=True)
    elif isinstance(want, tuple | list):
        assert type(have) is type(want)
        assert len(have) == len(want)
        for mine, theirs in zip(have, want, strict=True):
            same(mine, theirs, rtol, atol)
    elif isinstance(want, dict):
        assert list(have) == list(want)
        same(list(have.values()), list(want.values()), rtol, atol)
    elif isinstance(want, float):
        assert have == want or abs(have - want) <= atol + rtol * abs(want) or (have != have and want != want)
    elif not isinstance(want, torch.nn.Module):
        assert have == want


def seen_stride(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one position."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def sharing(tree: Any) -> list[tuple[int, int]]:
    """For each tensor, in order: the first tensor in the same storage, and the bytes from there to here."""
    found = [t for t in tensors_in(tree) if t.numel() and t.untyped_storage().nbytes()]
    homes: dict[int, int] = {}
    signature = []
    for n, tensor in enumerate(found):
        home = homes.setdefault(tensor.untyped_storage().data_ptr(), n)
        signature.append((home, tensor.data_ptr() - found[home].data_ptr()))
    return signature


def graph_values(graph: Graph) -> dict[str, Value]:
    """Every tensor of a graph by name."""
    return {name: found for name, found in graph.defs.items() if isinstance(found, Value)}


def without_views(steps: Sequence[Step]) -> list[Step]:
    """The steps that do something."""
    return [step for step in steps if not isinstance(step.node, View)]


def rejects(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> BaseException:
    """Eager rejects the call, and the compiled function does so with an error of the same type.

    Dynamo wraps what goes wrong while it traces: the error of that type is then the cause of Dynamo's, or quoted in it.
    Gives the compiled function's error.
    """
    theirs, mine = _twins(args)
    expected = _error(function, theirs)
    assert expected is not None, "eager takes this"
    torch.compiler.reset()
    found = _error(dcompile.compile(function, cache_dir=None, dynamic=dynamic), mine)
    assert found is not None, f"eager raises {type(expected).__name__}, the compiled function returns"
    chain: list[BaseException] = [found]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    quoted = f"{type(expected).__name__}(" in str(found)
    assert quoted or any(isinstance(e, type(expected)) for e in chain), f"{chain} instead of {expected!r}"
    return found


def _error(function: Callable[..., Any], args: tuple[Any, ...]) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None
