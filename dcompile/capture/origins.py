"""Which line of the user's program a graph node comes from."""

from __future__ import annotations

import functools
import re
import sysconfig
from pathlib import Path

import torch
from torch import fx

SOURCE = "dcompile_source"
"""Key of ``node.meta`` under which the line is handed to the next stages."""

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_KEY = re.compile(r"^[A-Z](?=\[)|[\[\]'\.]+")
_FOREIGN = (
    str(Path(torch.__file__).parent) + "/",
    str(Path(__file__).parents[1]) + "/",
    sysconfig.get_paths()["stdlib"] + "/",
)


def source_of(node: fx.Node) -> str:
    """The user's line behind ``node``, ``"train.py:41"``; else its module, ``"model.layers.0:Linear"``; else ``""``.

    The innermost frame outside PyTorch, the standard library and this package counts; if all frames are inside, the
    innermost one. A node of the backward graph has no frame of its own and takes the line of the forward op with its
    ``seq_nr``, which ``mark_sources`` has left in its meta.
    """
    known = node.meta.get(SOURCE)
    if isinstance(known, str) and known:
        return known
    trace = node.meta.get("stack_trace")
    line = _innermost(trace) if isinstance(trace, str) else ""
    return line or _module(node)


def mark_sources(gm: fx.GraphModule) -> None:
    """Write ``source_of`` into the meta of every node, following ``seq_nr`` from backward to forward ops."""
    by_sequence: dict[int, str] = {}
    for node in gm.graph.nodes:
        source = source_of(node)
        sequence = node.meta.get("seq_nr")
        if source and sequence is not None:
            by_sequence.setdefault(sequence, source)
    for node in gm.graph.nodes:
        source = source_of(node) or by_sequence.get(node.meta.get("seq_nr", -1), "")
        if source:
            node.meta[SOURCE] = source


def _module(node: fx.Node) -> str:
    """The innermost module: all there is when a library module is compiled by itself, without a frame of the user's."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{_KEY.sub(r'.', path).strip('.')}:{name.rpartition('.')[2]}"


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str) -> str:
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(trace)]
    own = [frame for frame in frames if not frame[0].startswith(_FOREIGN)]
    for file, line in reversed(own or frames):
        return f"{Path(file).name}:{line}"
    return ""
