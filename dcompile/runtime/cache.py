"""Compiled programs on disk: addressed by content, safe under concurrent ranks, never loaded from somebody else.

An entry is a folder of files and a ``meta.json`` with their checksums. It appears by one rename, so it is whole or
absent. One process builds an entry while the others wait for its file lock and then load; the lock of a process that
dies vanishes with it. An entry may be removed at any time: whoever fails to read one calls ``fetch`` again.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dcompile.errors import CacheError
from dcompile.runtime.trust import why_not_ours, why_replaceable

META = "meta.json"
IDENTITY = "identity"
VERSION = 1
MAX_BYTES = 4 * 2**30
"""Least recently used entries go when the folder is larger; a large model's program is about 10 MB."""

MIN_FREE_BYTES = 64 * 2**20
"""With less room on the disk nothing is added: the compiler's temporary files alone can take this much."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with when the disk, a quota or a limit of the process has no room for it."""

POLL_S = 0.02
"""Between two tries for a lock: short against a compile (seconds), long against the try (microseconds)."""


class _Unusable(Exception):
    """The cache folder cannot be used; says why."""


@dataclass
class CacheCounters:
    """What a cache has done: entries loaded, built, waited for; entries found corrupt or not trustworthy; builds in
    private folders because the cache could not be used."""

    hits: int = 0
    builds: int = 0
    waits: int = 0
    corrupt: int = 0
    untrusted: int = 0
    private: int = 0
    evictions: int = 0


def cache_key(*parts: object) -> str:
    """The address of what ``parts`` (texts, numbers, tuples of them) determine: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        text = repr(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


@dataclass
class Cache:
    """A folder of entries.

    Attributes:
        folder: where; None builds everything in private temporary folders.
        deadline_s: longest wait for another process that builds the same entry, in seconds.
        max_bytes: size the folder is kept under.
    """

    folder: Path | None
    deadline_s: float = 300.0
    max_bytes: int = MAX_BYTES
    counters: CacheCounters = field(default_factory=CacheCounters)
    _warned: set[str] = field(default_factory=set)

    def identity(self) -> str:
        """A text that this folder alone has, also as seen from other machines; "" if there is none to share."""
        if self.folder is None:
            return ""
        try:
            path = _safe_folder(self.folder) / IDENTITY
            if not path.exists():
                with tempfile.NamedTemporaryFile("w", dir=path.parent) as fresh, suppress(FileExistsError):
                    fresh.write(uuid.uuid4().hex)
                    fresh.flush()
                    os.link(fresh.name, path)
            return path.read_text()
        except (OSError, _Unusable):
            return ""

    def find(self, key: str) -> Path | None:
        """The folder of the entry ``key`` if it is there and can be trusted. Builds nothing, waits for nobody."""
        if self.folder is None:
            return None
        entry = self.folder / key[:2] / key
        try:
            if not entry.exists() or not self._usable(_safe_folder(self.folder) / key[:2] / key):
                return None
        except (OSError, _Unusable):
            return None
        self.counters.hits += 1
        return self._touch(entry)

    def fetch(self, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of the entry ``key``; ``build(folder)`` fills a new one if there is none that can be trusted.

        May be called again with the same key at any time, and builds again what has been removed meanwhile. Folders
        outside the cache live until the process ends.

        Raises:
            CacheError: ``key`` is no hexadecimal text, or ``build`` wrote no file.
            Exception: whatever ``build`` raises.
        """
        if not re.fullmatch(r"[0-9a-f]{8,128}", key):
            raise CacheError(f"cache key {key!r} is no hexadecimal text")
        try:
            if self.folder is None:
                return self._build_private(build)
            root = _safe_folder(self.folder)
            entry = root / key[:2] / key
            if self._usable(entry):
                self.counters.hits += 1
                return self._touch(entry)
            return self._build_or_wait(root, entry, build)
        except _Unusable as reason:
            self._warn(f"{reason}; compiling into a private temporary folder instead")
            self.counters.private += 1
            return self._build_private(build)

    def _build_or_wait(self, root: Path, entry: Path, build: Callable[[Path], None]) -> Path:
        asked = time.monotonic()
        with self._lock(root, entry.name, self.deadline_s):
            if time.monotonic() - asked > POLL_S:
                self.counters.waits += 1
            if self._usable(entry, count=False):
                self.counters.hits += 1
                return self._touch(entry)
            if shutil.disk_usage(root).free < MIN_FREE_BYTES:
                raise _Unusable(f"the disk of cache folder {root} is full")
            self._build_entry(root, entry, build)
            self.counters.builds += 1
        self._sweep(root)
        self._evict(root, keep=entry)
        return entry

    def _build_entry(self, root: Path, entry: Path, build: Callable[[Path], None]) -> None:
        """Build in a new folder and put it in place. The caller holds the lock of the entry."""
        with _os_errors(root):
            fresh = Path(tempfile.mkdtemp(prefix=f"new-{entry.name}-", dir=root))
        try:
            try:
                build(fresh)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise _Unusable(f"the disk of cache folder {root} is full ({error.strerror})") from error
                if fresh.exists():
                    raise
                raise _Unusable(f"cache folder {root} was removed during a build") from error
            with _os_errors(root):
                _seal(fresh, entry.name)
                _own_folder(entry.parent)
                _discard(root, entry)
                os.rename(fresh, entry)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _build_private(self, build: Callable[[Path], None]) -> Path:
        folder = _private_folder()
        build(folder)
        self.counters.builds += 1
        return folder

    def _usable(self, entry: Path, count: bool = True) -> bool:
        """Whether ``entry`` is there, ours alone to write, and whole."""
        try:
            found = entry.lstat()
        except OSError:
            return False
        if (fault := _fault(entry)) is None:
            return True
        if not _is_at(found, entry):
            return False  # another process has just removed or replaced it
        trusted, why = fault
        if trusted:
            self.counters.corrupt += count
        else:
            self.counters.untrusted += count
        self._warn(f"cache entry {entry} {why}; it is compiled again")
        return False

    def _touch(self, entry: Path) -> Path:
        """Note the use of ``entry`` for eviction."""
        try:
            os.utime(entry / META)
        except OSError:
            self._warn(f"cache folder {self.folder} cannot be written; the age of its entries is not kept")
        return entry

    @contextmanager
    def _lock(self, root: Path, name: str, deadline_s: float) -> Iterator[None]:
        """Hold the lock file of ``name``.

        Raises:
            _Unusable: another process holds it beyond the deadline, or the folder cannot be written.
        """
        with _os_errors(root):
            path = _own_folder(root / "locks") / name
            until = time.monotonic() + deadline_s
            while (handle := _try_lock(path)) is None:
                if time.monotonic() >= until:
                    raise _Unusable(
                        f"another process has been building {name[:12]} in {root} for more than {deadline_s:g} s"
                    )
                time.sleep(POLL_S)
        try:
            yield
        finally:
            with suppress(OSError):
                if _is_at(os.fstat(handle), path):
                    path.unlink()
            os.close(handle)

    def _sweep(self, root: Path) -> None:
        """Remove what killed processes left behind: unfinished folders older than the deadline, and locks."""
        oldest = time.time() - self.deadline_s
        for left in _unfinished(root):
            with suppress(OSError, _Unusable):
                if left.lstat().st_mtime < oldest:
                    with self._lock(root, left.name.split("-")[1], 0.0):
                        shutil.rmtree(left, ignore_errors=True)
        for lock in (root / "locks").glob("*"):
            with suppress(_Unusable), self._lock(root, lock.name, 0.0):
                pass  # letting go of a lock removes its file

    def _evict(self, root: Path, keep: Path) -> None:
        """Remove the least recently used entries beyond ``max_bytes``; programs that run keep their mapped files."""
        try:
            entries = [path.parent for path in root.glob(f"??/*/{META}")]
            aged = sorted((((path / META).stat().st_mtime, path, _size(path)) for path in entries), key=lambda e: e[:2])
            total = sum(size for _, _, size in aged) + sum(_size(path) for path in _unfinished(root))
        except OSError:
            return  # another process is removing entries right now
        for _, path, size in aged:
            if total <= self.max_bytes:
                return
            if path != keep:
                with suppress(OSError):
                    _discard(root, path)
                    self.counters.evictions += 1
                total -= size

    def _warn(self, message: str) -> None:
        """Once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"dcompile: {message}", RuntimeWarning, stacklevel=3)


@contextmanager
def _os_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unusable(f"cache folder {root} cannot be written ({error.strerror or error})") from error


def _try_lock(path: Path) -> int | None:
    """A descriptor of ``path`` that holds its lock; None if somebody else does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(
            os.fstat(handle), path
        ):  # else its former holder has removed it, and the lock that counts is another file
            return handle
    except BlockingIOError:
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _is_at(found: os.stat_result, path: Path) -> bool:
    """Whether the file that was ``found`` is the one that is called ``path`` now."""
    try:
        return os.path.samestat(found, path.lstat())
    except FileNotFoundError:
        return False


def _unfinished(root: Path) -> list[Path]:
    """Folders that are being built or removed, ``new-KEY-*`` and ``old-KEY-*``, or that nobody finished."""
    return [*root.glob("new-*"), *root.glob("old-*")]


def _discard(root: Path, entry: Path) -> None:
    """Remove ``entry`` if it is there, at once as seen by others."""
    aside = tempfile.mkdtemp(prefix=f"old-{entry.name}-", dir=root)
    try:
        with suppress(FileNotFoundError):
            os.rename(entry, Path(aside) / entry.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _private_folder() -> Path:
    """A new folder for this process alone, removed when it ends (and not when a forked child does)."""
    made = tempfile.mkdtemp(prefix="dcompile-")
    atexit.register(_remove_if_ours, made, os.getpid())
    return Path(made)


def _remove_if_ours(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _own_folder(path: Path) -> Path:
    """``path``, made with mode 0700 if it is not there, like the folders above it.

    Raises:
        _Unusable: it cannot be made, or others could write to it.
    """
    with _os_errors(path):
        for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        why = why_not_ours(path)
    if why is not None:
        raise _Unusable(f"cache folder {path} {why}")
    return path


def _safe_folder(path: Path) -> Path:
    """``_own_folder`` that nobody else can replace by another.

    Raises:
        _Unusable: see ``_own_folder``; or a folder on the way to it is open to others.
    """
    _own_folder(path)
    with _os_errors(path):
        why = why_replaceable(path)
    if why is not None:
        raise _Unusable(f"cache folder {path} is not safe: {why}")
    return path


def _fault(entry: Path) -> tuple[bool, str] | None:
    """What is wrong with ``entry``, and whether at least only this user could have written it; None if nothing is."""
    try:
        if (why := _why_untrusted(entry)) is not None:
            return False, why
        if (why := _why_corrupt(entry)) is not None:
            return True, f"is corrupt ({why})"
    except OSError as error:
        return True, f"cannot be read ({error})"
    return None


def _why_untrusted(entry: Path) -> str | None:
    for path in (entry.parent, entry, *entry.iterdir()):
        if path.is_symlink():
            return f"contains a link, {path.name}"
        if (why := why_not_ours(path)) is not None:
            return f"has a part, {path.name}, that {why}"
    return None


def _why_corrupt(entry: Path) -> str | None:
    try:
        meta = json.loads((entry / META).read_text())
        files = dict(meta["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META}: {type(error).__name__}"
    if meta.get("version") != VERSION or meta.get("key") != entry.name:
        return f"{META} is of another version or entry"
    if set(files) != {path.name for path in entry.iterdir()} - {META}:
        return "files are missing or added"
    return next((f"{name} has another checksum" for name, sha in files.items() if _sha(entry / name) != sha), None)


def _seal(folder: Path, key: str) -> None:
    """Write ``meta.json`` and take write permission of others away."""
    files = {path.name: _sha(path) for path in sorted(folder.iterdir())}
    if not files:
        raise CacheError(f"nothing was built for cache entry {key}")
    (folder / META).write_text(json.dumps({"version": VERSION, "key": key, "files": files}, indent=1))
    for path in folder.iterdir():
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
