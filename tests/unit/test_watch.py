"""What is printed and dumped while compiling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dcompile
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.options import SHOWABLE
from dcompile.pipeline import PASSES


def program(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).softmax(-1) * 2


STAGES = ["lower", *(step.name for step in PASSES)]


def compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int = 0, **environment: str) -> None:
    """Compile and run ``program`` as rank ``rank``, under ``DCOMPILE_*`` variables."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("DCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    for name, value in environment.items():
        monkeypatch.setenv(f"DCOMPILE_{name}", value)
    torch.compiler.reset()
    x, w = torch.randn(4, 6), torch.randn(6, 8)
    torch.testing.assert_close(torch.compile(program, backend="dcompile")(x, w), program(x, w))


EXPECTED = {
    "passes": rf"inference\d+: (?:{'|'.join(STAGES)}) +\d+ nodes +\d+\.\d ms",
    "ir": r"graph inference\(.*= kernel ",
    "code": r'extern "C".*def call\(inputs',
    "verdicts": r"overlap: inference: program order \(no collectives\)",
    "memory": r"peak [\d,]+ bytes; arenas: .*\d+ bytes",
    "timeline": r"inference: predicted \d+ us.*extern +aten\.mm\.default",
}


def test_every_kind_has_an_expectation() -> None:
    assert EXPECTED.keys() == SHOWABLE


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_each_kind_is_printed_to_standard_error_and_no_other(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_once(monkeypatch, tmp_path, SHOW=kind)
    out, err = capsys.readouterr()
    assert out == ""
    assert set(re.findall(r"^\[dcompile (\w+)\]", err, re.MULTILINE)) == {kind}
    assert re.search(EXPECTED[kind], err, re.DOTALL), err


def test_passes_are_printed_in_the_order_they_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_once(monkeypatch, tmp_path, SHOW="passes,ir")
    err = capsys.readouterr().err
    assert re.findall(r"^\[dcompile passes\] \w+: (\w+)", err, re.MULTILINE) == STAGES
    assert "+++ fuse" in err, "a pass is shown as a difference to the graph before"


def test_other_ranks_print_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_once(monkeypatch, tmp_path, rank=1, SHOW=",".join(SHOWABLE))
    assert "[dcompile" not in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 3])
def test_every_stage_is_dumped_into_the_folder_of_its_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_once(monkeypatch, tmp_path, rank=rank, DUMP=str(tmp_path / "dump"))
    assert capsys.readouterr().err == ""
    (folder,) = (tmp_path / "dump" / f"rank{rank}").iterdir()
    assert re.fullmatch(r"inference\d+", folder.name)
    assert [path.name for path in (tmp_path / "dump").iterdir()] == [f"rank{rank}"]
    files = sorted(path.name for path in folder.iterdir())
    wanted = ["capture.py", *(f"{stage}.ir" for stage in STAGES), "plan.txt", "kernels.cpp", "host.py"]
    numbers, names = zip(*(name.split("-", 1) for name in files), strict=True)
    assert numbers == tuple(f"{n:02d}" for n in range(len(files)))
    assert list(names) == wanted
    for path in folder.glob("*.ir"):
        text = path.read_text()
        assert print_graph(parse_graph(text)).strip() == text.strip(), path.name
    text = (folder / next(name for name in files if name.endswith("plan.txt"))).read_text()
    assert "predicted" in text
    assert "peak" in text
    host = next(name for name in files if name.endswith("host.py"))
    compile((folder / host).read_text(), host, "exec")


def test_a_skipped_pass_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compile_once(monkeypatch, tmp_path, DUMP=str(tmp_path / "dump"), SKIP="overlap, choose_layouts")
    names = {path.stem.split("-", 1)[1] for path in (tmp_path / "dump").rglob("*.ir")}
    assert names.issuperset(set(STAGES) - {"overlap", "choose_layouts"})
    assert not names & {"overlap", "choose_layouts"}


def test_a_watched_compile_goes_through_every_stage_though_the_cache_has_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile_once(monkeypatch, tmp_path)
    dcompile.reset_counters()
    compile_once(monkeypatch, tmp_path, DUMP=str(tmp_path / "dump"))
    assert list((tmp_path / "dump").rglob("*-host.py"))
    assert dcompile.counters().cache_hits == 0
