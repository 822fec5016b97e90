"""The rules of the repository itself: architecture, types, style, and that CI runs what the README says."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dcompile.options import Options

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {"dcompile": ROOT / "dcompile", "dcompile_launch": ROOT / "launch" / "dcompile_launch"}
HOMES: list[dict[str, Any]] = PROJECT["tool"]["dcompile"]["homes"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of both packages: dotted name and syntax tree."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            parts = [package, *(part for part in inner if part != "__init__")]
            yield ".".join(parts), ast.parse(path.read_text(), str(path))


def imported(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports, or reaches by attribute from an imported package."""
    local: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, module)
            for alias in node.names:
                local[alias.asname or alias.name] = f"{base}.{alias.name}"
                yield node.lineno, f"{base}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in local:
                yield node.lineno, ".".join([local[inner.id], *reversed(names)])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def strangers(module: str, tree: ast.Module, home: dict[str, Any]) -> list[str]:
    if any(within(module, allowed) for allowed in [home["module"], *home["allowed"]]):
        return []
    return [f"{module}:{line} uses {name}" for line, name in imported(module, tree) if within(name, home["module"])]


@pytest.mark.parametrize("home", HOMES, ids=[home["module"] for home in HOMES])
def test_modules_with_a_home_are_not_used_elsewhere(home: dict[str, Any]) -> None:
    found = [entry for module, tree in sources() for entry in strangers(module, tree, home)]
    assert not found, f"{home['module']} belongs to {home['allowed'] or 'nobody'}, because {home['reason']}: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed",
        "import torch.distributed.rpc as rpc",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\ntorch.distributed.barrier()",
        "import torch as t\nt.distributed.barrier()",
        "def f():\n    import torch.distributed as dist",
    ],
)
def test_the_check_of_homes_sees_every_way_to_reach_a_module(text: str) -> None:
    home = {"module": "torch.distributed", "allowed": ["dcompile.runtime"]}
    assert strangers("dcompile.schedule.order", ast.parse(text), home)
    assert not strangers("dcompile.runtime.comm", ast.parse(text), home)
    assert not strangers("dcompile.schedule.order", ast.parse("import torch\ntorch.distributions.Normal"), home)


def test_imports_point_one_way() -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))"
    result = run("-c", command)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_types() -> None:
    result = run("-m", "mypy")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("arguments", [("check", "--no-fix"), ("format", "--check")])
def test_style(arguments: tuple[str, ...]) -> None:
    result = run("-m", "ruff", *arguments, ".")
    assert result.returncode == 0, result.stdout


def readme_commands() -> list[str]:
    """The shell blocks of README's "Two commands" section."""
    section = (ROOT / "README.md").read_text().split("## Two commands", 1)[1].split("\n## ", 1)[0]
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def test_ci_runs_the_second_command_of_the_readme() -> None:
    train, test = readme_commands()
    script = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert script[-1] == test
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "\n" not in train
    assert "-c constraints-cpu.txt" in train


def test_the_first_command_of_the_readme_trains_the_example() -> None:
    train, _ = readme_commands()
    assert re.search(r"dcompile-launch --nproc 2 (\S+)", train).group(1) == "examples/train_gpt.py"
    assert (ROOT / "examples" / "train_gpt.py").is_file()


def test_constraints_pin_every_test_dependency() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints-cpu.txt").read_text().split() if "==" in line)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    assert {re.split(r"[<>=]", entry)[0] for entry in wanted} <= set(pins)


def test_torch_range_is_the_same_everywhere() -> None:
    (torch,) = (entry for entry in PROJECT["project"]["dependencies"] if entry.startswith("torch"))
    assert torch == "torch>=2.11,<2.15"
    assert "torch 2.11 to 2.14" in (ROOT / "README.md").read_text()


def test_entry_points_name_real_modules() -> None:
    entry = PROJECT["project"]["entry-points"]["torch_dynamo_backends"]["dcompile"]
    for target in (entry, *PROJECT["project"]["scripts"].values()):
        module, _, function = target.partition(":")
        (tree,) = (tree for name, tree in sources() if name == module)
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_every_package_folder_is_shipped() -> None:
    for package, folder in PACKAGES.items():
        without = [path.parent for path in folder.rglob("*.py") if not (path.parent / "__init__.py").is_file()]
        assert not without, package
        assert (folder / "py.typed").is_file()


UNWANTED = {
    "number of an issue": r"(?i)\bissues? ?#?\d|(?<![\w&])#\d",
    "word of a tracker": r"(?i)\b(?:[j]ira|[t]ickets?|[s]prints?|[w]orkplaces?)\b",
    "absolute path of a machine": r"(?<![\w.}])/(?:home|Users|root|work|workspace)/\w",
    "address of a package registry": r"(?i)\b(?:pypi|pythonhosted)\.org|download\.pytorch\.|-{2}(?:extra-)?index-url",
}
"""What the repository's text does not say: it describes the program, for any machine, and not how it was made."""


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Path and content of every file under version control that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            with contextlib.suppress(UnicodeDecodeError):
                yield name, (ROOT / name).read_text()


@pytest.mark.parametrize("what", UNWANTED)
def test_no_tracked_text_contains_a(what: str) -> None:
    texts = dict(tracked_texts())
    assert len(texts) > 100
    lines = [(name, n, line) for name, text in texts.items() for n, line in enumerate(text.splitlines(), 1)]
    found = [f"{name}:{n}: {line.strip()[:120]}" for name, n, line in lines if re.search(UNWANTED[what], line)]
    assert not found, f"{what}: {found}"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("number of an issue", "see issue" + " 12"),
        ("number of an issue", "fixes #" + "12"),
        ("word of a tracker", "the tick" + "et asks for it"),
        ("absolute path of a machine", "cd '/ho" + "me/someone/code'"),
        ("address of a package registry", "pip install --index" + "-url x"),
    ],
)
def test_the_check_of_texts_sees(what: str, text: str) -> None:
    assert re.search(UNWANTED[what], text)


def test_the_documents_name_each_other() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    others = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert others
    assert all(f"]({name})" in index for name in others), others
    for document in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} names {target}"


def test_the_readme_lists_every_option_with_its_variable() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(DCOMPILE_\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    variables = {field.name: "DCOMPILE_" + field.name.upper() for field in fields(Options)}
    assert dict(rows) == variables | {"dump_dir": "DCOMPILE_DUMP"}
