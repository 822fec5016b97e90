"""Compiling and loading C++ text."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dcompile.errors import ToolchainError
from dcompile.runtime.toolchain import (
    compile_async,
    compile_shared,
    compiler_fingerprint,
    find_compiler,
    load_functions,
    openmp_library,
)

DOUBLE = """#include <stdint.h>
extern "C" int64_t twice(float* y, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) y[i] *= 2;
  return n;
}
"""


@dataclass(frozen=True)
class Arity:
    buffers: int
    sizes: int


def test_compile_load_and_call(tmp_path: Path) -> None:
    out = tmp_path / "made" / "twice.so"
    compile_shared(DOUBLE, out)
    assert [file.name for file in out.parent.iterdir()] == ["twice.so"]  # nothing temporary stays
    twice = load_functions(out, {"twice": Arity(1, 1)})["twice"]
    x = torch.randn(1000)
    want = x * 2
    assert twice(x.data_ptr(), 1000, 2) == 1000
    assert torch.equal(x, want)


def test_async_result_may_be_asked_twice(tmp_path: Path) -> None:
    running = compile_async(DOUBLE, tmp_path / "twice.so")
    assert running.result() == running.result() == tmp_path / "twice.so"
    assert running.done()
    assert load_functions(tmp_path / "twice.so", {"twice": Arity(1, 1)})


def test_rejected_text_shows_command_and_output(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"(?s)march=native.*no_such_type") as caught:
        compile_shared("no_such_type x;", tmp_path / "x.so")
    assert "status 1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_compiler_says_how_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainError, match=r"no-such-compiler.*apt-get install g"):
        find_compiler("no-such-compiler --fast")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match="apt-get install g"):
        find_compiler()


def test_command_may_hold_arguments() -> None:
    name = find_compiler()[0]
    assert find_compiler(f"{name} -DX=1") == (name, "-DX=1")


def test_missing_function_or_library(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="absent"):
        load_functions(tmp_path / "absent.so", {})
    compile_shared(DOUBLE, tmp_path / "twice.so")
    with pytest.raises(ToolchainError, match="thrice"):
        load_functions(tmp_path / "twice.so", {"thrice": Arity(1, 1)})


def test_fingerprint_depends_on_the_compiler() -> None:
    plain = compiler_fingerprint(None)
    assert plain == compiler_fingerprint(None)
    assert plain != compiler_fingerprint(f"{find_compiler()[0]} -DX=1 -std=c++20 -mno-fma")


def test_one_openmp_runtime_in_the_process(tmp_path: Path) -> None:
    shipped = openmp_library()
    if shipped is None or not os.path.exists("/proc/self/maps"):
        pytest.skip("this PyTorch ships no OpenMP runtime of its own")
    compile_shared(DOUBLE, tmp_path / "twice.so")
    ctypes.CDLL(str(tmp_path / "twice.so"))
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert {os.path.realpath(path) for path in loaded} == {os.path.realpath(shipped)}
