"""Launch functions, with a stand-in for the driver's launch that reads the parameters as the driver does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from dcompile.errors import DCompileError
from dcompile.runtime import cuda_launch
from dcompile.runtime.cuda_launch import TRAILING_NULLS, LaunchPlan, launch_function

STREAM = ctypes.c_void_p(0x55)


class Driver:
    """Notes what each launch would read."""

    def __init__(self, parameters: int, status: int = 0) -> None:
        self.parameters, self.status, self.seen = parameters, status, list[Any]()

    def __call__(self, handle: Any, *rest: Any) -> int:
        *shape, stream, pointers, extra = rest
        words = [ctypes.cast(pointers[n], ctypes.POINTER(ctypes.c_int64))[0] for n in range(self.parameters)]
        nulls = [ctypes.cast(pointers[self.parameters + n], ctypes.POINTER(ctypes.c_int64))[0] for n in range(4)]
        assert nulls == [0] * TRAILING_NULLS
        assert extra.value is None
        self.seen.append((handle.value, [n.value for n in shape], stream.value, words))
        return self.status


def plan(buffers: int, sizes: int, programs: str) -> LaunchPlan:
    return LaunchPlan(ctypes.c_void_p(7), buffers, sizes, programs, 128, 1024, 0x1000)


def test_a_launch_passes_addresses_sizes_and_the_fault_word() -> None:
    driver = Driver(4)
    launch = launch_function(plan(2, 1, "-(-s0 // 64)"), 16, None, driver)
    assert launch(2**47 + 16, 32, 130, STREAM) == 0
    assert driver.seen == [(7, [3, 1, 1, 128, 1, 1, 1024], 0x55, [2**47 + 16, 32, 130, 0x1000])]


def test_nothing_is_launched_for_no_programs() -> None:
    driver = Driver(2)
    assert launch_function(plan(1, 0, "0"), 16, None, driver)(16, STREAM) == 0
    driver = Driver(3)
    assert launch_function(plan(1, 1, "s0"), 16, None, driver)(16, 0, STREAM) == 0
    assert driver.seen == []


@pytest.mark.parametrize(("addresses", "aligned"), [((16, 4096), True), ((16, 24), False), ((8, 32), False)])
def test_an_odd_address_takes_the_other_version(addresses: tuple[int, int], aligned: bool) -> None:
    driver, other = Driver(3), list[Any]()
    unaligned: Callable[..., int] = lambda *values: other.append(values) or 0  # noqa: E731
    launch_function(plan(2, 0, "5"), 16, unaligned, driver)(*addresses, STREAM)
    assert (len(driver.seen), len(other)) == ((1, 0) if aligned else (0, 1))


def test_a_launch_inside_a_launch_has_parameters_of_its_own() -> None:
    driver = Driver(2)
    launch = launch_function(plan(1, 0, "1"), 16, None, lambda *values: reenter(values))
    depth = []

    def reenter(values: tuple[Any, ...]) -> int:
        if not depth:
            depth.append(1)
            launch(32, STREAM)
        return driver(*values)

    launch(16, STREAM)
    assert [seen[3][0] for seen in driver.seen] == [32, 16]


def test_a_refused_launch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(status: int, what: str) -> None:
        raise DCompileError(f"{what} failed ({status})")

    monkeypatch.setattr(cuda_launch, "check", check)
    launch = launch_function(plan(1, 0, "1"), 16, None, Driver(2, status=700))
    with pytest.raises(DCompileError, match="700"):
        launch(16, STREAM)
