"""One rank's program: nodes in order over modelled memory, stopping at every launch."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph, SizeInput
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Literal, Node, Pack, Pointwise, Reduction, Ref, Scan, Store, View, calls_programs
from dcompile.ir.symbolic import MEASURED, find, holds, is_check
from dcompile.ir.types import DType, Number, Value
from dcompile.reference import loops
from dcompile.reference.evaluate import size_value
from dcompile.reference.programs import call_programs

Result = Tensor | int | float | bool | None
Splits = tuple[list[int], list[int]]
Steps = Generator[tuple[Start, list[Tensor], Splits | None], list[Tensor], list[Result]]


class Memory:
    """Tensors by name, the run-time values of size symbols, and the programs that may be called."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.sizes: dict[sympy.Symbol, int] = {}
        self.programs: dict[str, Graph] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CompilerBug(f"{name} is read before it is defined")
        return self.tensors[name]

    def layout(self, value: Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides at run time."""
        return (
            tuple(size_value(n, self.sizes) for n in value.shape),
            tuple(size_value(n, self.sizes) for n in value.stride),
        )

    def fresh(self, value: Value) -> Tensor:
        """New poisoned memory with the value's layout."""
        shape, stride = self.layout(value)
        return loops.poison(torch.empty_strided(shape, stride, dtype=value.dtype.torch))

    def allocate(self, value: Value) -> Tensor:
        """New poisoned memory under the value's name."""
        self.tensors[value.name] = self.fresh(value)
        return self.tensors[value.name]

    def bind_inputs(self, graph: Graph, inputs: list[Tensor | int]) -> None:
        """Name the inputs.

        Raises:
            ValueError: number, type, dtype, shape or strides are not as declared.
        """
        if len(inputs) != len(graph.inputs):
            raise ValueError(f"{graph.name} takes {len(graph.inputs)} inputs, {len(inputs)} were given")
        for declared, given in zip(graph.inputs, inputs, strict=True):
            if isinstance(declared, SizeInput) and (
                isinstance(given, Tensor) or self.sizes.setdefault(declared.symbol, given) != given
            ):
                raise ValueError(f"{given!r} was given for the size {declared.symbol}")
        for declared, given in zip(graph.inputs, inputs, strict=True):
            if isinstance(declared, Value):
                self._bind_tensor(declared, given)

    def _bind_tensor(self, declared: Value, given: Tensor | int) -> None:
        if not isinstance(given, Tensor):
            raise ValueError(f"{given!r} was given for the tensor {declared.name}")
        shape, stride = self.layout(declared)
        same_steps = all(n <= 1 or a == b for n, a, b in zip(shape, stride, given.stride(), strict=False))
        if given.dtype is not declared.dtype.torch or tuple(given.shape) != shape or not (same_steps or 0 in shape):
            raise ValueError(
                f"{declared.name} is declared {declared.dtype.value}{list(shape)} with strides {list(stride)}, "
                f"{given.dtype}{list(given.shape)} with strides {list(given.stride())} was given"
            )
        self.tensors[declared.name] = given.detach()


def run_rank(graph: Graph, inputs: list[Tensor | int]) -> Steps:
    """Run one graph; yields (launch, sources, splits) at each Start and is sent the results."""
    memory = Memory()
    memory.bind_inputs(graph, inputs)
    memory.programs = {inner.name: inner for inner in graph.graphs}
    in_flight: dict[str, _Flight] = {}
    for node in graph.nodes:
        if isinstance(node, Start):
            sources = [memory[name].detach().clone(memory_format=torch.contiguous_format) for name in node.sources]
            in_flight[node.pending.name] = flight = _Flight(node, memory, sources)
            flight.answers = yield node, sources, _splits(node, memory)
        elif isinstance(node, Wait):
            if node.pending not in in_flight:
                raise CompilerBug(f"wait for {node.pending}, which is not in flight")
            in_flight.pop(node.pending).land(node, memory)
        else:
            _run_node(node, memory)
    if in_flight:
        raise CompilerBug(f"{graph.name} ends with {', '.join(in_flight)} in flight")
    return [_output(out, memory) for out in graph.outputs]


def _run_program(graph: Graph, inputs: list[Any]) -> list[Result]:
    """Run a program that another calls.

    Raises:
        CompilerBug: it communicates.
    """
    try:
        next(run_rank(graph, [t.clone() if isinstance(t, Tensor) else t for t in inputs]))
    except StopIteration as stop:
        found: list[Result] = stop.value
        return found
    raise CompilerBug(f"{graph.name} communicates, which a called program must not")


def _splits(node: Start, memory: Memory) -> Splits | None:
    """Rows to and from each rank, where they are not equal."""
    if not node.in_splits:
        return None
    sent, received = ([size_value(rows, memory.sizes) for rows in s] for s in (node.in_splits, node.out_splits))
    return sent, received


def _output(out: Any, memory: Memory) -> Result:
    if isinstance(out, Ref):
        return memory[out.name].item() if out.item else memory[out.name]
    return size_value(out, memory.sizes) if isinstance(out, sympy.Expr) else out


class _Flight:
    """A collective from its launch to its wait."""

    def __init__(self, start: Start, memory: Memory, sources: list[Tensor]) -> None:
        self.start = start
        self.sources = sources
        self.answers: list[Tensor] = []
        self.results = [memory.fresh(value) for value in start.pending.results]
        if start.pending.in_place:
            self.results = [loops.poison(memory[name]) for name in start.sources]
        self.untouched = [result.clone() for result in self.results]

    def land(self, node: Wait, memory: Memory) -> None:
        """Define the results.

        Raises:
            CompilerBug: the wait defines other values than the launch announced, or memory was written in flight.
        """
        if node.outs != self.start.pending.results:
            raise CompilerBug(f"the wait for {node.pending} defines other values than its launch announced")
        for result, before in zip(self.results, self.untouched, strict=True):
            if not _same_bits(result, before):
                raise CompilerBug(f"a result of {node.pending} was written in flight")
        if not self.start.pending.in_place:
            for name, before in zip(self.start.sources, self.sources, strict=True):
                if not _same_bits(memory[name], before):
                    raise CompilerBug(f"{name}, a source of {node.pending}, was written in flight")
        for value, result, answer in zip(node.outs, self.results, self.answers, strict=True):
            if result.shape != answer.shape:
                raise CompilerBug(f"{value.name} has shape {tuple(result.shape)}, its collective {tuple(answer.shape)}")
            memory.tensors[value.name] = result.copy_(answer)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same = (a == b) | ((a != a) & (b != b))
    return bool(same.all())


def _run_node(node: Node, memory: Memory) -> None:
    tensors, sizes = memory.tensors, memory.sizes
    if isinstance(node, Pointwise):
        result = memory.fresh(node.out)
        loops.pointwise(node, result, tensors, sizes)
        tensors[node.out.name] = result
    elif isinstance(node, Reduction):
        results = [memory.fresh(value) for value in node.defs]
        loops.reduction(node, results, tensors, sizes)
        tensors.update(zip((value.name for value in node.defs), results, strict=True))
    elif isinstance(node, Scan):
        results = [memory.fresh(value) for value in node.outs]
        loops.scan(node, results, tensors, sizes)
        tensors.update(zip((value.name for value in node.outs), results, strict=True))
    elif isinstance(node, View):
        tensors[node.out.name] = loops.view(node, memory[node.base], sizes)
    elif isinstance(node, Store):
        loops.store(node, memory[node.target], tensors, sizes)
        tensors[node.out.name] = memory[node.target]
    elif isinstance(node, Pack):
        parts = torch.cat([memory[part].reshape(-1) for part in node.parts])
        memory.allocate(node.out).copy_(parts)
    elif isinstance(node, Kernel):
        targets = node.targets or (None,) * len(node.outs)
        for out, target in zip(node.outs, targets, strict=True):
            if target is None:
                memory.allocate(out)
            else:
                tensors[out.name] = memory[target]
        loops.kernel(node, tensors, sizes)
    elif is_check(node):
        if not holds(node, memory.sizes):
            raise RuntimeError(node.args[-1])
    elif isinstance(node, Extern):
        _call(node, memory)
    else:
        raise CompilerBug(f"{type(node).__name__} has no meaning to the reference interpreter")


def _call(node: Extern, memory: Memory) -> None:
    args = [_argument(arg, memory) for arg in node.args]
    kwargs = {key: _argument(arg, memory) for key, arg in node.kwargs}
    if node.op.startswith("dcompile.") and calls_programs(node):
        returned: Any = call_programs(node.op, args)
    elif node.op == "dcompile.resize_storage":
        returned = args[0].untyped_storage().resize_(int(args[1]))
    elif node.op == "dcompile.seeds":
        returned = torch.randint(-(2**63), 2**63 - 1, (int(args[0]),), dtype=torch.int64)
    else:
        returned = operator(node.op)(*args, **kwargs)
    results = _leaves(returned) if node.nested else list(returned) if node.seq else [returned]
    for at, promised in node.promises:
        if results[at] != (size_value(promised, memory.sizes) if isinstance(promised, sympy.Expr) else promised):
            raise CompilerBug(f"{node.op} returned {results[at]} where the program has {promised}")
    for number in node.binds:
        memory.sizes[symbol(number.name)] = _learn(number, node, results, memory)
    aliases = node.aliases or (None,) * len(node.outs)
    for value, alias, result in zip(node.outs, aliases, results, strict=False):
        if value is not None:
            memory.tensors[value.name] = _returned(node, value, alias, result, memory)
    for name, version in zip(node.writes, node.versions, strict=True):
        memory.tensors[version.name] = memory[name]


def _leaves(result: Any) -> list[Any]:
    return [leaf for item in result for leaf in _leaves(item)] if isinstance(result, tuple | list) else [result]


def _learn(number: Number, node: Extern, results: list[Any], memory: Memory) -> int:
    """The value of a number that a library call tells.

    Raises:
        CompilerBug: the call does not tell it.
    """
    source = find(number, node)
    if source is None:
        raise CompilerBug(f"{node.op} does not tell {number.name}")
    if source.out is None:
        return int(results[source.dim])
    names = [out.name if out is not None else "" for out in node.outs]
    tensor = results[names.index(source.out.name)] if source.out.name in names else memory[source.out.name]
    measured = tensor.shape[source.dim] if source.kind == "size" else tensor.stride(source.dim)
    return size_value(source.solved, {**memory.sizes, MEASURED: measured})


def _returned(node: Extern, value: Value, alias: str | None, result: Any, memory: Memory) -> Tensor:
    """The tensor a library call returned, in the layout the graph states.

    Raises:
        CompilerBug: no tensor, another shape or dtype, or memory of an operand that ``aliases`` does not name.
    """
    shape, stride = memory.layout(value)
    if not isinstance(result, Tensor) or tuple(result.shape) != shape or result.dtype is not value.dtype.torch:
        got = f"{result.dtype}{list(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise CompilerBug(f"{node.op} returned {got} for {value.name}, declared {value.dtype.value}{list(shape)}")
    found: Tensor = result.detach()
    if alias is not None:
        return found
    if found.numel() and any(_storage(found) == _storage(memory[name]) for name in node.operands):
        raise CompilerBug(f"{node.op} returned memory of an operand for {value.name}, which states no alias")
    return found if found.stride() == stride else torch.empty_strided(shape, stride, dtype=found.dtype).copy_(found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def operator(name: str) -> Any:
    """The library op called ``namespace.op.overload``.

    Raises:
        CompilerBug: there is none.
    """
    try:
        namespace, op, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (ValueError, AttributeError):
        raise CompilerBug(f"there is no library op {name}") from None


def _argument(arg: Any, memory: Memory) -> Any:
    if isinstance(arg, Ref):
        return memory[arg.name].item() if arg.item else memory[arg.name]
    if isinstance(arg, tuple):
        return [_argument(item, memory) for item in arg]
    if isinstance(arg, sympy.Expr):
        return size_value(arg, memory.sizes)
    if isinstance(arg, Literal):
        if arg.kind == "graph":
            return partial(_run_program, memory.programs[arg.value])
        if arg.kind == "device":
            return torch.device("cpu")
        if arg.kind == "complex":
            return complex(arg.value)
        if arg.kind == "dtype" and arg.value in {d.value for d in DType}:
            return DType(arg.value).torch
        return getattr(torch, arg.value)
    return arg
