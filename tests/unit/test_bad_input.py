"""What users get wrong, and what their machines lack: a clear error or a named fallback, never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dcompile
from dcompile.errors import DCompileError, ToolchainError
from tests.rows import ops  # noqa: F401 (registers ops)
from tests.rows.check import rejects


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    dcompile.reset_counters()


def double(x: Tensor) -> Tensor:
    return x * 2 + 1


def test_an_unsupported_dtype_names_the_line_and_the_way_out() -> None:
    def program(x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).float()

    with pytest.raises(Exception, match=r"test_bad_input\.py:\d+.*float8_e4m3fn.*Instead:") as caught:
        torch.compile(program, backend="dcompile")(torch.randn(4))
    assert "Unsupported" in str(caught.value)


def test_mixed_devices_are_named() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, y + 1

    with pytest.raises(Exception, match="meta"):
        torch.compile(program, backend="dcompile")(torch.randn(4), torch.randn(4, device="meta"))


def test_without_a_compiler_the_graph_runs_op_by_op_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    x = torch.randn(5)
    with pytest.warns(RuntimeWarning, match=r"op by op.*no C\+\+ compiler.*install"):
        found = torch.compile(double, backend="dcompile")(x)
    assert torch.equal(found, double(x))
    (name,) = dcompile.counters().fallbacks
    assert name.endswith("op by op")


def test_a_named_compiler_that_is_missing_is_an_error_of_its_own() -> None:
    from dcompile.runtime.toolchain import find_compiler

    with pytest.raises(ToolchainError, match="no-such-compiler"):
        find_compiler("no-such-compiler")


def test_a_cache_folder_that_cannot_be_written_is_left_out_with_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    x = torch.randn(5)
    with pytest.warns(RuntimeWarning, match="private temporary folder"):
        found = dcompile.compile(double, cache_dir=blocked)(x)
    torch.testing.assert_close(found, double(x))


def test_a_cache_folder_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    x = torch.randn(5)
    with pytest.warns(RuntimeWarning, match="can be written by other users"):
        found = dcompile.compile(double, cache_dir=shared)(x)
    torch.testing.assert_close(found, double(x))
    assert not list(shared.iterdir())


def test_options_are_checked() -> None:
    with pytest.raises(DCompileError, match="cannot show colours"):
        dcompile.compile(double, show={"colours"})
    with pytest.raises(Exception, match="cannot skip fuse"):
        dcompile.compile(double, skip={"fuse"})(torch.randn(3))
    with pytest.raises(Exception, match="takes options, not fast"):
        torch.compile(double, backend=lambda gm, args: dcompile.dcompile(gm, args, fast=True))(torch.randn(3))


def test_environment_values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCOMPILE_DEADLINE_S", "soon")
    with pytest.raises(DCompileError, match="DCOMPILE_DEADLINE_S='soon'"):
        dcompile.Options.from_env()


def test_an_input_that_does_not_fit_the_program_is_refused() -> None:
    from dcompile.pipeline import compile_graph

    gm = torch.fx.experimental.proxy_tensor.make_fx(double)(torch.randn(4, 4))
    run = compile_graph(gm, "inference0", dcompile.Options()).run
    with pytest.raises(DCompileError, match=r"f32|float32"):
        run([torch.randn(4, 4, dtype=torch.float64)])
    with pytest.raises(DCompileError, match="4"):
        run([torch.randn(5, 4)])


REJECTED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "matrix sizes": (lambda x, y: torch.mm(x, y) + 1, (torch.randn(3, 4), torch.randn(3, 4))),
    "broadcast": (lambda x, y: x + y, (torch.randn(3, 4), torch.randn(3, 5))),
    "dimension": (lambda x: x.sum(5) + 1, (torch.randn(3),)),
    "position": (lambda x: x[7] + 1, (torch.randn(3),)),
    "concatenation": (lambda x, y: torch.cat([x, y]) + 1, (torch.randn(3, 4), torch.randn(3, 5))),
    "mean of integers": (lambda x: x.mean(), (torch.arange(3),)),
    "view": (lambda x: x.t().view(-1) * 2, (torch.randn(3, 4),)),
    "item": (lambda x: x * x.item(), (torch.randn(3),)),
    "element type in place": (lambda x: x.add_(1.5), (torch.arange(3),)),
    "larger than its target": (lambda x, y: x.add_(y), (torch.randn(3), torch.randn(2, 3))),
    "channels": (lambda x, w: F.conv2d(x, w), (torch.randn(1, 3, 5, 5), torch.randn(4, 2, 3, 3))),
    "element types of a product": (lambda x, y: torch.mm(x, y), (torch.randn(3, 3), torch.randn(3, 3).double())),
    "minus of truths": (lambda x: x - x, (torch.tensor([True]),)),
    "storage bounds": (lambda x: x.as_strided((10,), (1,)) + 1, (torch.randn(3),)),
    "bits of floats": (lambda x: x & x, (torch.randn(3),)),
    "negative power of integers": (lambda x: x**-1, (torch.tensor([2, 3]),)),
    "gather out of range": (lambda x, i: x.gather(0, i) * 2, (torch.randn(3), torch.tensor([0, 5]))),
    "scatter out of range": (lambda x, i: x.scatter(0, i, 1.0) * 2, (torch.randn(3), torch.tensor([0, 9]))),
    "index out of range": (lambda x, i: x[i] * 2, (torch.randn(3), torch.tensor([0, -9]))),
    "row of a table": (lambda w, i: F.embedding(i, w) * 2, (torch.randn(5, 2), torch.tensor([0, 7]))),
    "class of a loss": (lambda x, t: F.cross_entropy(x, t), (torch.randn(3, 5), torch.tensor([0, 9, 1]))),
    "division by zero": (lambda x, y: x // y, (torch.tensor([4, 5]), torch.tensor([1, 0]))),
    "remainder by zero": (lambda x, y: x % y, (torch.tensor([4, 5]), torch.tensor([1, 0]))),
}


@pytest.mark.parametrize("what", REJECTED)
def test_what_eager_rejects_is_rejected_with_the_same_type(what: str) -> None:
    function, given = REJECTED[what]
    rejects(function, *given)


def test_errors_at_run_time_name_the_line() -> None:
    compiled = dcompile.compile(lambda x, i: x.gather(0, i) * 2, cache_dir=None)
    with pytest.raises(RuntimeError, match=r"index out of range in .*aten\.gather.* at test_bad_input\.py:\d+"):
        compiled(torch.randn(3), torch.tensor([0, 5]))


def test_what_cannot_be_done_is_named_with_the_line_and_the_way_out() -> None:
    def refused(x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).float()

    def unknown_truth(x: Tensor) -> Tensor:
        return x * torch.ops.dcompile_rows.total(x)

    for function in (refused, unknown_truth):
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"test_bad_input\.py:\d+.*Instead: "):
            dcompile.compile(function, cache_dir=None)(torch.ones(4))
