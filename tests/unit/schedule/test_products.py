"""Matrix products and the kernels that read them: what becomes one kernel, when, and that it does the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.analyse.flops import work
from dcompile.codegen.cpp import print_cpp
from dcompile.codegen.triton_launch import product_launches, shape_of
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Fold, Kernel, statements
from dcompile.ir.nodes import Extern
from dcompile.ir.types import DType
from dcompile.options import Options
from dcompile.pipeline.prices import structure
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.products import find_site, fragment, product_kernels

LINEAR = """
graph f(b: bf16[24]@cuda, x: bf16[40, 72]@cuda, w: bf16[72, 24]{1, 72}@cuda, r: f32[2, 20, 24]@cuda) {
  h: bf16[40, 24]@cuda = extern aten.addmm.default(%b, %x, %w) -> aten.addmm.out
  y: bf16[2, 20, 24]@cuda = pointwise (i0: 2, i1: 20, i2: 24) to_bf16(tanh(to_f32(h[i1 + 20*i0, i2])) + r[i0, i1, i2])
  return %y
}"""


def kernels_of(text: str, ctx: Context) -> Graph:
    return fuse(parse_graph(text).check(), ctx).check()


def context(library_us: float | None = None, kernel_us: float | None = None, tf32: bool = False) -> Context:
    """A GPU on which library calls and kernels take what is given; nothing can be measured on one without."""

    def measure(graph: Graph) -> float | None:
        return library_us if any(isinstance(node, Extern) for node in graph.nodes) else kernel_us

    costs = CostModel.analytical("cuda", 1)
    return Context(Options.from_env({"cache_dir": None}), costs, measure=measure, tf32=tf32)


def rewritten(text: str, tf32: bool = False) -> Graph:
    ctx = context(100.0, 50.0, tf32)
    return product_kernels(kernels_of(text, ctx), ctx)


def run(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    found = run_reference([graph], [[x.clone() for x in inputs]])[0]
    assert all(isinstance(x, Tensor) for x in found)
    return [x for x in found if isinstance(x, Tensor)]


@pytest.mark.row("N4")
def test_a_linear_layer_and_what_follows_are_one_kernel() -> None:
    graph = rewritten(LINEAR)
    (kernel,) = graph.nodes
    assert isinstance(kernel, Kernel)
    (fold,) = (s for s in statements(kernel.body) if isinstance(s, Fold))
    assert [acc.kind for acc in fold.accumulators] == ["dot"]
    assert [out.name for out in kernel.outs] == ["y"]
    assert parse_graph(print_graph(graph)) == graph
    generator = torch.Generator().manual_seed(0)
    b, x, w, r = (torch.randn(shape, generator=generator) for shape in ((24,), (40, 72), (24, 72), (2, 20, 24)))
    b, x, w = b.bfloat16(), x.bfloat16(), w.bfloat16().t()
    (found,) = run(graph, [b, x, w, r])
    exact = torch.tanh(x.double() @ w.double() + b.double()).reshape(2, 20, 24) + r.double()
    eager = (torch.tanh(torch.addmm(b, x, w).float()).reshape(2, 20, 24) + r).bfloat16()
    assert (found.double() - exact).abs().max() <= 1.5 * (eager.double() - exact).abs().max()


@pytest.mark.row("N4")
def test_measurements_decide() -> None:
    for library_us, kernel_us, replaced in ((100.0, 90.0, True), (100.0, 99.5, False), (50.0, 90.0, False)):
        ctx = context(library_us, kernel_us)
        graph = product_kernels(kernels_of(LINEAR, ctx), ctx)
        assert any(isinstance(node, Extern) for node in graph.nodes) is not replaced
        (verdict,) = (v for v in ctx.verdicts if v.stage == "products")
        assert str(kernel_us) in verdict.reason
    unmeasured = context(100.0, None)
    assert len(product_kernels(kernels_of(LINEAR, unmeasured), unmeasured).nodes) == 2
    plain = Context(Options.from_env({"cache_dir": None}), CostModel.analytical("cuda", 1))
    assert len(product_kernels(kernels_of(LINEAR, plain), plain).nodes) == 2


@pytest.mark.row("N4")
def test_a_product_that_others_read_is_written_too() -> None:
    graph = rewritten(LINEAR.replace("return %y", "return %y, %h"))
    (kernel,) = graph.nodes
    assert isinstance(kernel, Kernel)
    assert [out.name for out in kernel.outs] == ["y", "h"]
    inputs = [torch.randn(24), torch.randn(40, 72), torch.randn(24, 72), torch.randn(2, 20, 24)]
    given = [inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].bfloat16().t(), inputs[3]]
    _, h = run(graph, given)
    torch.testing.assert_close(h, torch.addmm(*given[:3]), rtol=1e-2, atol=1e-2)


@pytest.mark.row("N4")
def test_two_readers_are_legal_where_no_path_leads_from_one_to_the_other() -> None:
    text = """
graph f(x: f32[32, 16]@cuda, w: f32[16, 32]@cuda) {
  h: f32[32, 32]@cuda = extern aten.mm.default(%x, %w) -> aten.mm.out
  s: f32[32, 32]@cuda = extern aten.cumsum.default(%h, 0)
  y: f32[32, 32]@cuda = pointwise (i0: 32, i1: 32) h[i0, i1] * ADDED
  return %y, %s
}"""
    apart = rewritten(text.replace("ADDED", "2.0:f32"))
    assert [type(node) for node in apart.nodes] == [Kernel, Extern]
    between = rewritten(text.replace("ADDED", "s[i0, i1]"))
    assert [type(node) for node in between.nodes] == [Extern, Extern, Kernel]


@pytest.mark.row("N4")
@pytest.mark.parametrize(
    "reader",
    [
        "reduce sum (i0: 32; r0: 32) h[i0, r0]",
        "pointwise (i0: 32) h[i0, 0]",
        "pointwise (i0: 32, i1: 32) h[i0, i1] + h[i1, i0]",
        "pointwise (i0: 32, i1: 32, i2: 2) h[i0, i1]",
    ],
)
def test_readers_that_are_not_elementwise_stay_apart(reader: str) -> None:
    shape = {"re": "32", "pointwise (i0: 32)": "32"}.get(reader[:2], "") or (
        "32" if "i1" not in reader else "32, 32, 2" if "i2" in reader else "32, 32"
    )
    graph = rewritten(f"""
graph f(x: f32[32, 16]@cuda, w: f32[16, 32]@cuda) {{
  h: f32[32, 32]@cuda = extern aten.mm.default(%x, %w) -> aten.mm.out
  y: f32[{shape}]@cuda = {reader}
  return %y
}}""")
    assert [type(node) for node in graph.nodes] == [Extern, Kernel]


@pytest.mark.row("N4")
def test_memory_of_operands_is_not_written_over() -> None:
    graph = rewritten("""
graph f(x: f32[32, 32]@cuda, w: f32[32, 32]@cuda) {
  t: f32[32, 32]@cuda = extern aten.relu.default(%x)
  u: f32[32, 32]@cuda = extern aten.relu.default(%w)
  h: f32[32, 32]@cuda = extern aten.mm.default(%t, %w) -> aten.mm.out
  y: f32[32, 32]@cuda = pointwise (i0: 32, i1: 32) h[i0, i1] + t[i0, i1] + u[i0, i1]
  return %y
}""")
    kernel = graph.nodes[-1]
    assert isinstance(kernel, Kernel)
    assert kernel.inplace == (("y", "u"),)


@pytest.mark.row("N4")
def test_f32_products_are_exact_unless_the_library_may_round() -> None:
    text = LINEAR.replace("bf16", "f32").replace("to_f32(h[i1 + 20*i0, i2])", "h[i1 + 20*i0, i2]")
    text = text.replace("to_f32(tanh", "(tanh")
    for tf32, kind in ((False, "dot"), (True, "dot_tf32")):
        (kernel,) = rewritten(text, tf32).nodes
        assert isinstance(kernel, Kernel)
        assert [a.kind for s in statements(kernel.body) if isinstance(s, Fold) for a in s.accumulators] == [kind]


def test_work_and_structure_of_a_product() -> None:
    graph = rewritten(LINEAR)
    done = work(graph.nodes[0], graph)
    assert done.matmul_flops == 2 * 40 * 72 * 24
    assert done.dtype is DType.BF16
    other = rewritten(LINEAR.replace("h", "k").replace("tank(", "tanh(").replace("grapk", "graph"))
    assert structure(fragment(graph, graph.nodes)) == structure(fragment(other, other.nodes))
    apart = kernels_of(LINEAR, context())
    site = find_site(apart, 0)
    assert site is not None
    assert structure(fragment(apart, apart.nodes)) != structure(fragment(graph, graph.nodes))


def test_cuts_fit_the_product_and_shared_memory() -> None:
    (kernel,) = rewritten(LINEAR).nodes
    assert isinstance(kernel, Kernel)
    shape = shape_of(kernel)
    assert shape.product is not None
    cuts = product_launches(shape.product, shape.inner or (), {})
    assert len(cuts) > 1
    for cut in cuts:
        assert 16 <= cut.block <= 64
        assert 16 <= cut.inner <= 32
        assert cut.stages * cut.step * (cut.block + cut.inner) * 2 <= 160 * 1024


def test_the_cpu_printer_sums_products() -> None:
    text = print_graph(rewritten(LINEAR)).replace("@cuda", "")
    assert "+=" in print_cpp(parse_graph(text).check()).source
