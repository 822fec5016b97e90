from __future__ import annotations

import traceback
from collections.abc import Iterable

import pytest
import torch

from dcompile.errors import CompilerBug, DCompileError
from dcompile.runtime.comm import Handle
from dcompile.runtime.externs import resolve_op, seeds
from dcompile.runtime.program import Executable
from tests.adversary import AdversaryComm, World
from tests.unit.runtime.blocks import waiting_blocks

SOURCE = """
arena = rt.arena({"cpu": 64}, lambda block: ())
taken = []

def call(inputs):
    x, = inputs
    inputs.clear()
    p = None
    block = arena.take()
    taken.append(block)
    try:
        p = rt.comm.start("all_reduce", (x,), (x,), "g0", "sum", None, True, "p")
        rt.fault(int(x.numel() > 3), "aten.index at m.py:3")
        rt.comm.wait(p)
        result = [x]
    except BaseException:
        rt.abandon(arena, block, (p,))
        raise
    arena.give(block)
    return result
""".replace("rt.fault(int", "x.numel() > 3 and rt.fault(int")


class Stuck(AdversaryComm):
    """Cannot end what it started."""

    def drain(self, handles: Iterable[Handle | None], patient: bool = True) -> bool:
        return not any(handles)


def test_an_error_ends_what_is_in_flight_and_gives_the_block_back() -> None:
    comm = World(1, ranks=2).comm()
    run = Executable(SOURCE, "f", {}, comm)
    taken = run.run.__globals__["taken"]
    assert run([torch.ones(3)])[0].tolist() == [2, 2, 2]
    with pytest.raises(IndexError, match=r"index out of range in aten\.index at m\.py:3"):
        run([torch.ones(4)])
    assert comm.launched == comm.waited == ["p", "p"]
    assert taken[0] is taken[1]
    assert len(waiting_blocks(run)) == 1


def test_a_block_that_may_still_be_written_is_not_used_again() -> None:
    run = Executable(SOURCE, "f", {}, Stuck(World(1, ranks=2), 0))
    with pytest.raises(IndexError):
        run([torch.ones(4)])
    assert not waiting_blocks(run)


def test_tracebacks_show_the_generated_line() -> None:
    run = Executable("def call(inputs):\n    return inputs[7]  # the seventh\n", "f", {})
    try:
        run([])
    except IndexError:
        assert "return inputs[7]  # the seventh" in traceback.format_exc()
    else:
        pytest.fail("no error")


def test_programs_run_without_autograd() -> None:
    run = Executable("import torch\ndef call(inputs):\n    return [torch.is_grad_enabled()]\n", "f", {})
    with torch.enable_grad():
        assert run([]) == [False]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CompilerBug, match="no function k7"):
        Executable("k7 = rt.kernel('k7')", "f", {})
    with pytest.raises(CompilerBug, match="without a communicator"):
        Executable("comm = rt.comm", "f", {})
    with pytest.raises(CompilerBug, match="returned 9"):
        Executable("rt.fault(9, 'm.py:3')", "f", {})
    with pytest.raises(DCompileError, match=r"nolib\.noop\.default, which is not registered"):
        resolve_op("nolib.noop.default")
    with pytest.raises(CompilerBug, match=r"dcompile\.nothing"):
        resolve_op("dcompile.nothing")


def test_seeds_use_all_bits() -> None:
    found = seeds(4096)
    assert found.dtype is torch.int64
    assert found.min() < -(2**62)
    assert found.max() > 2**62
    assert found.unique().numel() == 4096
