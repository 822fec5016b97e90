"""Choosing between variants of a kernel, with a timer that says what the test wants; no GPU is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dcompile.codegen.triton import TritonModule, TritonSignature, Variant, print_triton
from dcompile.codegen.triton_launch import Launch
from dcompile.codegen.triton_variants import MOST_VARIANTS
from dcompile.errors import DCompileError
from dcompile.runtime.autotune import Tuner, fastest
from dcompile.runtime.cache import Cache
from dcompile.runtime.triton_kernels import KERNELS, Compiled, HasSignature, compile_module
from dcompile.runtime.triton_pool import Job, compile_jobs
from tests.unit.codegen.kernels import F32, column_sum, kernel_graph, softmax, value
from tests.unit.codegen.triton_cases import BIAS_GRADIENT, NORM_GRADIENT, module_of, on_cuda, softmax_case, strips_case

pytest.importorskip("triton")

HOPPER = 90


class FakeTimer:
    """Says ``times`` by launch and counts how often it is asked."""

    def __init__(self, time_of: Callable[[Compiled], float]) -> None:
        self.time_of, self.asked = time_of, 0

    def __call__(self, kernels: Sequence[Compiled], folder: Path, signature: HasSignature) -> list[float]:
        self.asked += 1
        assert all((folder / f"{kernel.name}.cubin").exists() for kernel in kernels)
        return [self.time_of(kernel) for kernel in kernels]


def tuned_module() -> TritonModule:
    return print_triton(on_cuda(kernel_graph([value("x", (2048, 1024))], softmax(2048, 1024))), variants=True)


def only(module: TritonModule) -> TritonSignature:
    (signature,) = module.signatures.values()
    return signature


def chosen(folder: Path) -> Compiled:
    (entry,) = json.loads((folder / KERNELS).read_text())["kernels"]
    return Compiled(**{**entry, "buffers": tuple(entry["buffers"])})


def test_the_fastest_variant_is_kept_under_the_name_the_host_calls(tmp_path: Path) -> None:
    module = tuned_module()
    signature = only(module)
    assert 1 < len(signature.variants) <= 1 + MOST_VARIANTS
    wanted = signature.variants[-1]
    timer = FakeTimer(lambda kernel: 1.0 if kernel.name == wanted.name else 2.0)
    (tmp_path / "a").mkdir()
    compile_module(module.source, module.signatures, tmp_path / "a", HOPPER, Tuner(Cache(None), "card", timer))
    kernel = chosen(tmp_path / "a")
    assert (kernel.name, kernel.called) == (wanted.name, signature.variants[0].name)
    assert (kernel.block, kernel.inner) == (wanted.launch.block, wanted.launch.inner)
    assert [path.stem for path in (tmp_path / "a").glob("*.cubin")] == [wanted.name]


def test_results_are_kept_by_structure_and_hardware(tmp_path: Path) -> None:
    module = tuned_module()
    timer = FakeTimer(lambda kernel: float(kernel.num_warps))
    names = []
    for n, card in enumerate(("card", "card", "other card")):
        folder = tmp_path / str(n)
        folder.mkdir()
        compile_module(module.source, module.signatures, folder, HOPPER, Tuner(Cache(tmp_path / "cache"), card, timer))
        names.append(chosen(folder).name)
    assert timer.asked == 2
    assert len(set(names)) == 1


def test_the_default_stays_where_nothing_can_be_measured(tmp_path: Path) -> None:
    def refuse(kernel: Compiled) -> float:
        raise DCompileError("no room")

    module = tuned_module()
    tuner = Tuner(Cache(tmp_path / "cache"), "card", FakeTimer(refuse))
    (tmp_path / "a").mkdir()
    compile_module(module.source, module.signatures, tmp_path / "a", HOPPER, tuner)
    assert chosen(tmp_path / "a").name == only(module).variants[0].name


def kernel(name: str, frame_bytes: int = 0) -> Compiled:
    return Compiled(name, (), 0, 1, 1, 4, "1", "model.py:1", frame_bytes=frame_bytes)


def test_a_variant_that_spills_is_not_measured(tmp_path: Path) -> None:
    launch = Launch(1, 64, True, 4)
    signature = TritonSignature(
        (), 0, (Variant("a", launch, "1"), Variant("b", replace(launch, num_warps=8), "1")), "model.py:1", "x"
    )
    timer = FakeTimer(lambda _: 1.0)
    tuner = Tuner(Cache(tmp_path), "card", timer)
    assert tuner.best(signature, [kernel("a"), kernel("b", 64)], tmp_path).name == "a"
    assert tuner.best(replace(signature, structure="y"), [kernel("a", 64), kernel("b")], tmp_path).name == "b"
    assert timer.asked == 0


def test_noise_changes_nothing() -> None:
    kernels = [kernel("a"), kernel("b")]
    assert fastest(kernels, [100.0, 99.0]).name == "a"
    assert fastest(kernels, [100.0, 90.0]).name == "b"


def test_small_kernels_and_default_compiles_have_one_variant() -> None:
    small = print_triton(on_cuda(kernel_graph([value("x", (16, 64))], softmax(16, 64))), variants=True)
    assert len(only(small).variants) == 1
    assert len(only(module_of(softmax_case(2048, 1024, F32))).variants) == 1


def large(text: str) -> str:
    return text.replace("96", "8192").replace("48", "768").replace("56", "768")


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        tuned_module,
        lambda: print_triton(on_cuda(kernel_graph([value("x", (8192, 1024))], column_sum(8192, 1024))), variants=True),
        lambda: print_triton(strips_case(large(NORM_GRADIENT)).graph, variants=True),
        lambda: print_triton(strips_case(large(BIAS_GRADIENT)).graph, variants=True),
    ],
)
def test_every_variant_compiles(make: Callable[[], TritonModule], tmp_path: Path) -> None:
    module = make()
    (tmp_path / "module.py").write_text(module.source)
    jobs = [
        Job(str(tmp_path / "module.py"), str(tmp_path / v.name), v.name, signature.buffers, signature.sizes,
            {"X": v.launch.block, "R": v.launch.inner}, v.launch.num_warps, HOPPER)
        for signature in module.signatures.values() for v in signature.variants
    ]  # fmt: skip
    assert max(len(s.variants) for s in module.signatures.values()) > 1
    answers = compile_jobs(jobs)
    assert [answer for answer in answers if isinstance(answer, str)] == []


def test_processes_compile_what_threads_compile_and_say_what_is_wrong(tmp_path: Path) -> None:
    module = module_of(softmax_case(3, 40, F32))
    ((name, signature),) = module.signatures.items()
    (tmp_path / "module.py").write_text(module.source)

    def job(out: str, inner: int) -> Job:
        blocks = {"X": signature.launch.block, "R": inner}
        return Job(str(tmp_path / "module.py"), str(tmp_path / out), name, signature.buffers, 0, blocks, 4, HOPPER)

    jobs = [job(f"{n}", 64) for n in range(4)] + [job("bad", 48)]
    threads, processes = compile_jobs(jobs[:1], cores=1), compile_jobs(jobs, cores=8)
    assert threads == processes[:1]
    assert isinstance(processes[-1], str)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "3").read_bytes()
