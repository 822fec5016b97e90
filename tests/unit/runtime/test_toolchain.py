"""Compiling and loading C++ text."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from dcompile.errors import ToolchainError
from dcompile.runtime.toolchain import (
    Arity,
    compile_shared,
    compiler_fingerprint,
    find_compiler,
    load_functions,
    openmp_library,
    probe,
)

DOUBLE = """#include <stdint.h>
extern "C" int64_t twice(float* y, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) y[i] *= 2;
  return n;
}
"""


def test_compile_load_and_call(tmp_path: Path) -> None:
    out = tmp_path / "made" / "twice.so"
    compile_shared(DOUBLE, out)
    assert [file.name for file in out.parent.iterdir()] == ["twice.so"]  # nothing temporary stays
    twice = load_functions(out, {"twice": Arity(1, 1)})["twice"]
    x = torch.randn(1000)
    want = x * 2
    assert twice(x.data_ptr(), 1000, 2) == 1000
    assert torch.equal(x, want)


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


def test_a_command_may_be_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, f'exec {find_compiler()[0]} "$@"')
    monkeypatch.chdir(tmp_path)
    compile_shared(DOUBLE, tmp_path / "twice.so", "./cxx -DX=1")
    assert load_functions(tmp_path / "twice.so", {"twice": Arity(1, 1)})


def test_missing_function_or_library(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="absent"):
        load_functions(tmp_path / "absent.so", {})
    compile_shared(DOUBLE, tmp_path / "twice.so")
    with pytest.raises(ToolchainError, match="thrice"):
        load_functions(tmp_path / "twice.so", {"thrice": Arity(1, 1)})


def test_fingerprint_depends_on_the_compiler() -> None:
    plain = compiler_fingerprint(None)
    assert plain == compiler_fingerprint(None)
    name = find_compiler()[0]
    assert compiler_fingerprint(name) == plain
    assert len({plain, compiler_fingerprint(f"{name} -DX=1"), compiler_fingerprint(f"{name} -fno-tree-vectorize")}) == 3


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\necho run >> {folder}/log\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_working_compiler_passes_the_probe() -> None:
    probe()
    probe(f"{find_compiler()[0]} -DX=1")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "status 1"),
        ("exit 0", "apt-get install g"),
        ("echo 'math.h: No such file' >&2; exit 4", r"(?s)status 4.*math\.h: No such file"),
    ],
)
def test_a_broken_compiler_fails_the_probe_once(tmp_path: Path, script: str, message: str) -> None:
    cxx = fake_compiler(tmp_path, script)
    for _ in range(2):
        with pytest.raises(ToolchainError, match=message):
            probe(cxx)
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_missing_header_folder_fails_the_probe() -> None:
    with pytest.raises(ToolchainError, match=r"math\.h"):
        probe(f"{find_compiler()[0]} -nostdinc")


def test_a_missing_compiler_is_looked_for_again(tmp_path: Path) -> None:
    cxx = str(tmp_path / "cxx")
    with pytest.raises(ToolchainError, match="not on the path"):
        probe(cxx)
    fake_compiler(tmp_path, f'exec {find_compiler()[0]} "$@"')
    probe(cxx)


def test_one_openmp_runtime_in_the_process(tmp_path: Path) -> None:
    shipped = openmp_library()
    if shipped is None or not os.path.exists("/proc/self/maps"):
        pytest.skip("this PyTorch ships no OpenMP runtime of its own")
    compile_shared(DOUBLE, tmp_path / "twice.so")
    ctypes.CDLL(str(tmp_path / "twice.so"))
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert {os.path.realpath(path) for path in loaded} == {os.path.realpath(shipped)}
