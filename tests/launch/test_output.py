"""What the launcher shows and keeps of its ranks' output; where ranks are placed; job templates."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path

import pytest

from dcompile.runtime import last_words
from dcompile_launch import compiling
from dcompile_launch.elastic import MEANINGS
from dcompile_launch.merged import Follower
from dcompile_launch.rank import cores_of, memory_nodes, share
from dcompile_launch.templates import TEMPLATES, template
from tests.launch.test_elastic import run


def test_lines_of_all_ranks_are_merged_as_they_come(tmp_path: Path) -> None:
    out = io.StringIO()
    follower = Follower(tmp_path, "job", out)
    files = {}
    for rank in (0, 1):
        folder = tmp_path / "job_x1" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        files[rank] = (folder / "stdout.log").open("w")
    files[1].write("first\nsec")
    files[1].flush()
    assert follower.poll() == 1
    files[0].write("other\n")
    files[0].flush()
    files[1].write("ond\nunfinished")
    files[1].flush()
    assert follower.poll() == 2
    assert follower.poll(last=True) == 1
    for file in files.values():
        file.close()
    lines = [re.sub(r"^\d\d:\d\d:\d\d\.\d\d\d ", "", line) for line in out.getvalue().splitlines()]
    assert lines == [
        "rank 1 attempt 0 stdout | first",
        "rank 0 attempt 0 stdout | other",
        "rank 1 attempt 0 stdout | second",
        "rank 1 attempt 0 stdout | unfinished",
    ]


def test_the_line_while_ranks_compile(tmp_path: Path) -> None:
    assert compiling.line(compiling.stages(tmp_path), 3) == ""
    for rank, stage in enumerate(("fuse", "c++ compiler", "", "lower", "lower", "lower")):
        (tmp_path / str(rank)).write_text(stage)
    text = compiling.line(compiling.stages(tmp_path), 12.4)
    assert text == "compiling for 12 s: rank 0 fuse, rank 1 c++ compiler, rank 3 lower, rank 4 lower, and 1 more"


def test_shares_of_cores() -> None:
    nodes = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [share("cores", rank, 3, nodes) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [share("auto", rank, 4, nodes) for rank in range(4)] == [nodes[0], nodes[0], nodes[1], nodes[1]]
    assert share("auto", 0, 1, nodes) is None, "one rank may use both nodes"
    assert share("auto", 0, 4, [[0, 1]]) is None
    assert share("cores", 0, 3, [[0, 1]]) is None, "fewer cores than ranks"
    assert share("none", 0, 2, nodes) is None


def test_memory_nodes_are_read_from_the_system(tmp_path: Path) -> None:
    assert cores_of("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    for number, text in ((0, "0-3"), (1, "4-7"), (10, "8-11"), (2, "12")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(text)
    assert memory_nodes([1, 2, 5, 8], tmp_path) == [[1, 2], [5], [8]]
    assert memory_nodes([3, 1], tmp_path / "absent") == [[1, 3]]


def test_exit_codes_have_meanings() -> None:
    codes = [value for name, value in vars(last_words).items() if name.endswith("_EXIT")]
    assert sorted(codes) == sorted(MEANINGS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_printed_and_well_formed(name: str) -> None:
    text = template(name)
    assert "dcompile-launch" in text
    if TEMPLATES[name].endswith(".sh"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    else:
        yaml = pytest.importorskip("yaml")
        service, job = yaml.safe_load_all(text)
        pod = job["spec"]["template"]["spec"]
        assert service["metadata"]["name"] == pod["subdomain"]
        assert f"--nnodes={job['spec']['completions']}" in pod["containers"][0]["command"]
        volumes = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes == {volume["name"] for volume in pod["volumes"]}


PLACED = """\
import os, sys
assert sys.argv == [__file__, "--flag"] and __name__ == "__main__"
sys.stdout.write(f"rank {os.environ['RANK']} cores {sorted(os.sched_getaffinity(0))}\\n")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    raise ValueError("the first attempt fails")
"""


@pytest.mark.multi_rank
def test_restarts_pins_and_the_merged_log(tmp_path: Path) -> None:
    script = tmp_path / "placed.py"
    script.write_text(PLACED)
    logs = tmp_path / "logs"
    result = run(
        "--nproc", "2", "--pin", "cores", "--max-restarts", "1", "--log-dir", str(logs), str(script), "--flag"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = (logs / "merged.log").read_text()
    assert "rank 1 attempt 0 stderr | ValueError: the first attempt fails" in text
    shares = {rank: set(re.findall(rf"attempt 1 stdout \| rank {rank} cores \[(.*)\]", text)) for rank in (0, 1)}
    assert all(len(found) == 1 for found in shares.values())
    assert shares[0] != shares[1]
