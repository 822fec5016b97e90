"""Freed memory stays with the process: a second round of large tensors costs no page faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes
import resource
import sys
import torch
from dcompile.runtime.kept_memory import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    raise SystemExit("unknown allocator")
if sys.argv[1] == "keep":
    assert keep_freed_memory()
else:  # glibc's first threshold, held: left alone, it moves by what was freed before
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)

def step():
    kept = [torch.ones(2**20 + 4096 * n) for n in range(24)]
    del kept

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ROOT = Path(__file__).resolve().parents[3]
FEW = 500
"""Page faults of a step whose memory is there: its 24 tensors have 25,000 pages."""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, cwd=ROOT, check=False)
    if "unknown allocator" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_second_step_finds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert faults("keep") < FEW < faults("give back")
