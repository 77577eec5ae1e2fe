"""Files that are either complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from minimodels.errors import InputError

LOCK = "lock"


def read_json(path: Path, field: str | None = None) -> dict:
    """The JSON object in a file. If there is none, raises InputError, which
    names `field` or the file."""
    try:
        if not path.is_file():
            raise OSError("no such file" if not path.exists() else "not a regular file")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(field or path.name, str(path), f"a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise InputError(field or path.name, str(path), "a JSON object")
    return found


def write_json(path: Path, content: dict) -> None:
    """Write JSON. Whatever happens, the file is complete or unchanged."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path. At the end it replaces the file; after an error it is deleted.

    The path is in a folder of its own. If a process was killed and left any files there, the next
    call deletes them. The new file is on the disk before it replaces the old one.
    """
    folder = path.with_name(path.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / path.name
        # use the umask, because safetensors makes files private
        os.chmod(folder / path.name, folder.stat().st_mode & 0o666)
        sync(folder / path.name)
        os.replace(folder / path.name, path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a file, and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder: no other process gets it until the block or the process ends.

    Raises InputError, which says which process has the lock. Without file locks, as on Windows,
    nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            "folder", str(folder), f"one that can be written ({error.strerror})"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                "folder", str(folder), f"one in which no other process writes; {holder} does"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
