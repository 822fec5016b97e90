"""Cache entries of Triton kernels, without a GPU; loading and launching are tested in tests/gpu."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dcompile.errors import ToolchainError
from dcompile.runtime.triton_kernels import KERNELS, MODULE, Compiled, compile_kernel, compile_module, load_module
from tests.unit.codegen.triton_cases import CASES, module_of

pytest.importorskip("triton")

HOPPER = 90


def test_an_entry_describes_every_launch(tmp_path: Path) -> None:
    module = module_of(CASES["dynamic"]())
    compile_module(module.source, module.signatures, tmp_path, HOPPER)
    found = json.loads((tmp_path / KERNELS).read_text())
    assert found["target"] == HOPPER
    (name, signature), (kernel,) = next(iter(module.signatures.items())), found["kernels"]
    assert (kernel["name"], kernel["sizes"], kernel["programs"]) == (name, 2, signature.programs)
    assert eval(kernel["programs"], {"s0": 9, "s1": 9}) == 9
    assert (tmp_path / MODULE).read_text() == module.source


def test_alignment_widens_accesses(tmp_path: Path) -> None:
    module = module_of(CASES["softmax"]())
    compile_module(module.source, module.signatures, tmp_path, HOPPER)
    (entry,) = json.loads((tmp_path / KERNELS).read_text())["kernels"]
    kernel = Compiled(**{**entry, "buffers": tuple(entry["buffers"])})
    loaded = load_module(tmp_path / MODULE)
    aligned, plain = (compile_kernel(loaded, kernel, HOPPER, aligned=choice)[0] for choice in (True, False))
    assert aligned != plain


def test_a_rejected_kernel_is_named(tmp_path: Path) -> None:
    module = module_of(CASES["softmax"]())
    ((name, signature),) = module.signatures.items()
    wrong = replace(signature.variants[0], launch=replace(signature.launch, inner=48))
    broken = replace(signature, variants=(wrong,))
    with pytest.raises(ToolchainError, match=f"{name}.*model.py:7"):
        compile_module(module.source, {name: broken}, tmp_path, HOPPER)


def test_a_parse_that_another_thread_disturbed_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    real, calls = triton.compile, []

    def disturbed(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=36, after=34)")
        return real(*args, **kwargs)

    monkeypatch.setattr(triton, "compile", disturbed)
    module = module_of(CASES["dynamic"]())
    compile_module(module.source, module.signatures, tmp_path, HOPPER)
    assert len(calls) == len(module.signatures) + 1
    assert len(list(tmp_path.glob("*.cubin"))) == len(module.signatures)
