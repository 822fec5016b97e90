"""Whether another user could have written, or could replace, what is about to be loaded."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

ROOT_UID = 0


def why_not_ours(path: Path) -> str | None:
    """None if ``path`` belongs to this user and only this user can write it; else the reason, as half a sentence.

    Raises:
        OSError: it cannot be examined.
    """
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def why_replaceable(path: Path) -> str | None:
    """None if no other user can rename or replace ``path``; else the folder on the way to it that allows it, and why.

    Every folder above, also above each symbolic link on the way, must belong to root or this user, and must not be
    writable by others unless it is sticky.

    Raises:
        OSError: a folder cannot be examined.
    """
    for above in dict.fromkeys(_folders_above(path)):
        found = above.stat()
        if found.st_uid not in (ROOT_UID, os.getuid()):
            return f"folder {above} belongs to user {found.st_uid}"
        shared = found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
        if (shared or found.st_mode & stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            return f"folder {above} can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _folders_above(path: Path) -> Iterator[Path]:
    """The folders whose entries are looked up on the way to ``path``, as written and as each link says."""
    path = path.absolute()
    yield from reversed(path.parents)
    for part in (path, *path.parents):
        if part.is_symlink():
            yield from _folders_above(part.parent / part.readlink())


def _is_private_group(gid: int) -> bool:
    """Whether this user alone is in the group: systems that give each user a group let it write the home folder."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
