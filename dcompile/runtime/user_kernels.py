"""Launching Triton kernels of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def launch(held: tuple[Any, Mapping[str, Any]], grids: Sequence[Sequence[int]], given: Mapping[str, Any]) -> None:
    """Launch a kernel.

    Args:
        held: the kernel, autotuned or not, and its constant arguments.
        grids: one for each configuration of the tuner, in its order; or one for all.
        given: its other arguments by name.
    """
    kernel, constants = held
    arguments = {**given, **constants}
    names = list(getattr(kernel, "arg_names", ()))
    # by position as far as possible: hooks of configurations see positional arguments only
    positional = []
    for name in names:
        if name not in arguments:
            break
        positional.append(arguments.pop(name))
    kernel[_grid(kernel, grids)](*positional, **arguments)


def _grid(kernel: Any, grids: Sequence[Sequence[int]]) -> Any:
    """The grid, as a function of the configuration if there are several."""
    if len(grids) == 1:
        return tuple(grids[0])
    configurations = [config.all_kwargs() for config in kernel.configs]

    def chosen(meta: Mapping[str, Any]) -> tuple[int, ...]:
        for configuration, grid in zip(configurations, grids, strict=True):
            if all(meta.get(key) == value for key, value in configuration.items() if key in meta):
                return tuple(grid)
        raise LookupError(f"the kernel was tuned to a configuration it does not list: {dict(meta)}")

    return chosen


USER_KERNEL_OPS = {"dcompile.launch": launch}
