"""Modules that stand around the user's module without showing in its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn

PREFIX = "module."


class Wrapper(nn.Module):
    """A module around another one. ``state_dict`` has the keys of the wrapped module, without a prefix.

    Attributes:
        module: the wrapped module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        hooks: Any = self
        hooks.register_state_dict_post_hook(_strip_prefix)
        hooks.register_load_state_dict_pre_hook(_add_prefix)


def _strip_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Name entries as the wrapped module alone would."""
    _rename(state, prefix + PREFIX, prefix)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        metadata.pop(prefix.removesuffix("."), None)
        for key in [key for key in metadata if (key + ".").startswith(prefix + PREFIX)]:
            metadata[(prefix + (key + ".")[len(prefix + PREFIX) :]).removesuffix(".")] = metadata.pop(key)


def _add_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo ``_strip_prefix`` before entries are looked up."""
    _rename(state, prefix, prefix + PREFIX)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    """Give every key that starts with ``old`` the prefix ``new``, keeping the order of the dictionary."""
    renamed = [(new + key[len(old) :] if key.startswith(old) else key, value) for key, value in state.items()]
    state.clear()
    state.update(renamed)
