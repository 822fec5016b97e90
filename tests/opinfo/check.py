"""One operator against eager PyTorch: every sample compiled, run, and compared."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

import dcompile
from dcompile.capture import capture
from tests.opinfo.batch import Batch, Program
from tests.opinfo.compare import difference
from tests.opinfo.known import UNINITIALISED
from tests.opinfo.operators import OPERATORS, Sample, sample_of, samples

SEED = 7


@dataclass
class Report:
    """What became of one operator.

    Attributes:
        ok: number of samples that agree.
        failures: what is wrong, a line each, the sample's name first.
        untraceable: why AOTAutograd alone cannot trace a sample either, by sample.
        kernels, library: kernel launches and library calls of all samples' graphs.
        fallbacks: library calls made for want of a rule, by op.
        rejected: samples that eager itself rejects.
    """

    name: str
    ok: int = 0
    failures: list[str] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    kernels: int = 0
    library: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    rejected: int = 0

    @property
    def only_library(self) -> bool:
        """Whether no kernel was generated although the library was called."""
        return self.kernels == 0 and bool(self.library)


@dataclass(frozen=True)
class Result:
    """Outputs, inputs afterwards, and gradients by input, of one run."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    gradients: list[Tensor | None]

    @property
    def all(self) -> list[tuple[str, Tensor | None]]:
        named = [(f"output {n}", t) for n, t in enumerate(self.outputs)]
        named += [(f"input {n} afterwards", t) for n, t in enumerate(self.inputs)]
        return [*named, *((f"gradient {n}", t) for n, t in enumerate(self.gradients))]


def run(function: Callable[..., Any], inputs: list[Tensor], seed: int = SEED) -> Result:
    """Call it, and its backward with random cotangents where an output has one."""
    torch.manual_seed(seed)
    outputs = list(function(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    differentiable = [t for t in outputs if t.requires_grad]
    gradients: list[Tensor | None] = []
    if wanted and differentiable:
        cotangents = [_cotangent(t, n) for n, t in enumerate(differentiable)]
        gradients = list(torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True))
    return Result([t.detach() for t in outputs], [t.detach() for t in inputs], gradients)


def draws(sample: Sample, grad: bool) -> bool:
    """Whether eager draws random numbers in this call."""
    watch = _Draws()
    with watch:
        sample.function(*sample.fresh(grad))
    return watch.drawn


class _Draws(TorchDispatchMode):
    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _cotangent(like: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{tuple(like.shape)} {number}".encode()))
    wide = torch.complex128 if like.dtype.is_complex else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like.dtype)


def as_graph(function: Callable[..., Any], count: int, sizes: int = 0) -> fx.GraphModule:
    """The function as the one node of a graph, the way a Dynamo backend is called; first come inputs for sizes."""
    graph = fx.Graph()
    for number in range(sizes):
        graph.placeholder(f"s{number}")
    graph.output(graph.call_function(function, tuple(graph.placeholder(f"x{n}") for n in range(count))))
    return fx.GraphModule({}, graph)


def traced(
    sample: Sample, grad: bool, compile_graph: Callable[[Any], Any], dynamic: bool = False
) -> Callable[..., Any]:
    """The compiled sample.

    Args:
        dynamic: all sizes but 0 and 1 are symbols.
    """
    # all graphs of a sample in one batch
    with functorch_config.patch(force_non_lazy_backward_lowering=True):
        return _given(sample, grad, lambda gm, inputs: capture(gm, inputs, compile_graph), dynamic)


def _given(sample: Sample, grad: bool, backend: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """What ``backend`` makes of the sample's graph and inputs."""
    inputs: list[Any] = sample.fresh(grad)
    if not dynamic:
        return backend(as_graph(sample.function, len(inputs)), inputs)  # type: ignore[no-any-return]
    with _symbolic(inputs) as fakes:
        places = _symbols(fakes)
        sizes = [fakes[n].shape[d] for n, d in places]
        compiled = backend(as_graph(sample.function, len(inputs), len(sizes)), [*sizes, *fakes])
    return lambda *tensors: compiled(*(tensors[n].shape[d] for n, d in places), *tensors)


def _symbols(fakes: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where each size symbol first stands: (tensor, dimension)."""
    found: dict[Any, tuple[int, int]] = {}
    for n, fake in enumerate(fakes):
        for d, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (n, d))
    return list(found.values())


@contextmanager
def _symbolic(inputs: list[Tensor]) -> Iterator[list[Tensor]]:
    """Fake tensors of symbolic sizes, in the tracing context of Dynamo."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for number, tensor in enumerate(inputs):
        sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC] * tensor.dim())
        fakes.append(mode.from_tensor(tensor, symbolic_context=sizes, source=ConstantSource(f"x{number}")))
    with tracing(TracingContext(mode)):
        yield fakes


def why_untraceable(sample: Sample, grad: bool, dynamic: bool = False) -> str:
    """The error AOTAutograd raises with a backend that does nothing; "" if it traces."""

    def as_it_is(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        return make_boxed_func(gm.forward)

    try:
        _given(sample, grad, aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is), dynamic)
    except Exception as error:
        return summary(error)
    return ""


def summary(error: BaseException) -> str:
    """Type and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:240]


@dataclass
class Prepared:
    """Samples of one operator that are traced; their kernels may still wait to be built."""

    report: Report
    grad: bool
    traced: list[tuple[Sample, Result, Callable[..., Any], list[Program]]] = field(default_factory=list)


def check_operator(name: str, dtype: torch.dtype, count: int, folder: Path, variant: str = "") -> Report:
    """Compile ``count`` samples of an operator and compare them with eager.

    Args:
        variant: "", "in_place" (the mutated input is compared too) or "dynamic" (symbolic sizes).
    """
    batch = Batch(folder)
    prepared = prepare(name, dtype, count, batch, variant)
    batch.build()
    return finish(prepared)


def prepare(name: str, dtype: torch.dtype, count: int, batch: Batch, variant: str = "", beyond: int = 0) -> Prepared:
    """Run ``count`` samples in eager mode and trace them; ``batch`` holds their programs. See ``samples``."""
    in_place, dynamic = variant == "in_place", variant == "dynamic"
    grad = not in_place and OPERATORS[name].supports_autograd and dtype.is_floating_point
    report = Report(name)
    prepared = Prepared(report, grad)
    for sample in samples(name, dtype, count, grad, in_place, beyond):
        try:
            want = run(sample.function, sample.fresh(grad))
        except Exception:
            report.rejected += 1
            continue
        before = len(batch.programs)
        try:
            compiled = traced(sample, grad, batch.compile_graph, dynamic)
        except Exception as error:
            if why := why_untraceable(sample, grad, dynamic):
                report.untraceable[sample.name] = why
            else:
                report.failures.append(f"{sample.name}: compiling: {summary(error)}")
            continue
        prepared.traced.append((sample, want, compiled, batch.programs[before:]))
    return prepared


def finish(prepared: Prepared) -> Report:
    """Run the compiled samples and compare."""
    report = prepared.report
    for sample, want, compiled, programs in prepared.traced:
        wrong = _compare(sample, want, compiled, prepared.grad, report.name)
        if wrong:
            report.failures.append(f"{sample.name}: {wrong}")
        else:
            report.ok += 1
        for program in programs:
            report.kernels += program.launches
            report.library += program.externs
            report.fallbacks += program.fallbacks
    return report


def _compare(sample: Sample, want: Result, compiled: Callable[..., Any], grad: bool, name: str) -> str:
    try:
        got = run(compiled, sample.fresh(grad))
    except Exception as error:
        return f"running: {summary(error)}"
    if differs(want, got) == "":
        return ""
    if name in UNINITIALISED:
        return differs(want, got, values=False)
    if draws(sample, grad):  # other numbers than eager's, but the same ones under the same seed
        return differs(want, got, values=False) or differs(got, run(compiled, sample.fresh(grad)))
    return differs(want, got, _exact(sample, grad))


def differs(want: Result, got: Result, exact: Result | None = None, values: bool = True) -> str:
    if len(want.all) != len(got.all):
        return f"{len(got.all)} results, eager gives {len(want.all)}"
    for n, ((what, mine), (_, theirs)) in enumerate(zip(got.all, want.all, strict=True)):
        if (mine is None) != (theirs is None):
            if mine is not None and not mine.any():
                continue  # AOTAutograd gives zeros where eager gives no gradient
            return f"{what}: {'missing' if mine is None else 'there'}, not so in eager"
        if mine is not None and theirs is not None:
            close = exact.all[n][1] if exact is not None and n < len(exact.all) else None
            own = not what.startswith("gradient")  # autograd brings a gradient into its tensor's layout
            if wrong := difference(mine, theirs, close, values, own):
                return f"{what}: {wrong}"
    return ""


def _exact(sample: Sample, grad: bool) -> Result | None:
    try:
        return run(sample.function, sample.fresh(grad, torch.float64))
    except Exception:
        return None


def check_rejections(name: str, folder: Path) -> list[str]:
    """Calls that eager rejects: each must be rejected, compiling or running, by an error of the same type.

    The quick way leaves Dynamo out. What is not rejected there like that must be by ``torch.compile`` as a whole, for
    Dynamo rejects a part of the calls before any backend sees them. Its own errors count by their causes.
    """
    op = OPERATORS[name]
    batch = Batch(folder)
    missed: list[tuple[Sample, Exception]] = []
    ready: list[tuple[Sample, Exception, Callable[..., Any]]] = []
    for number, given in enumerate(op.error_inputs("cpu")):
        sample = sample_of(f"{name}[{number}]", op.get_op(), given.sample_input)
        expected = _rejection(sample.function, sample)
        if expected is None:
            continue
        try:
            compiled = traced(sample, False, batch.compile_graph)
        except Exception as error:
            missed += [] if isinstance(error, type(expected)) else [(sample, expected)]
        else:
            ready.append((sample, expected, compiled))
    batch.build()
    missed += [(s, e) for s, e, compiled in ready if not isinstance(_rejection(compiled, s), type(e))]
    return [wrong for sample, expected in missed if (wrong := _rejected_by_compile(sample, expected, folder))]


def _rejection(function: Callable[..., Any], sample: Sample) -> Exception | None:
    try:
        function(*sample.fresh(False))
    except Exception as error:
        return error
    return None


def _rejected_by_compile(sample: Sample, expected: Exception, folder: Path) -> str:
    """What is wrong with how the function, compiled as users do, rejects the sample; "" if nothing."""
    torch.compiler.reset()
    error = _rejection(dcompile.compile(sample.function, dynamic=False, cache_dir=folder), sample)
    if error is None:
        return f"{sample.name} is accepted; eager: {summary(expected)}"
    torch.compiler.reset()
    without = _rejection(torch.compile(sample.function, dynamic=False, backend="eager"), sample)
    if without is not None and summary(without) == summary(error):
        return ""  # PyTorch's own tracing says so
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, type(expected)):
            return ""
        cause = cause.__cause__
    return f"{sample.name}: {summary(error)}; eager: {summary(expected)}"
