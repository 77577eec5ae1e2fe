"""Finds the text files of a folder, and identifies a text wherever it is stored.

Text is every regular file below the folder, with these exceptions: hidden files and folders, those
of version control, folders of training runs and caches, files of weights, unfinished files, and a
second link to the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# folders, in addition to all whose name begins with "."
SKIPPED = {"CVS", "_darcs", "_svn", "__pycache__"}
OPTIONS = {"context", "data", "seed"}  # entries of options.json that mark a training run
CACHE_TAG = "CACHEDIR.TAG"  # marks a folder of files that can be made again (bford.info/cachedir)
WHOLE = 2**28  # bytes of text up to which every byte enters the fingerprint
BLOCK = 2**16  # bytes that are read at one place of a larger text


def find_files(root: Path) -> list[Path]:
    """The text files in a folder and its subfolders, ordered by their paths.

    Links are followed, but no file is found twice and no cycle is entered. Files in the folder
    itself take precedence over links to them. Raises OSError if a folder cannot be listed.
    """
    found, pending, links = [], [root], []
    seen, linked = {identity(root.stat())}, set()  # `linked`: found through a link
    while pending or links:
        if pending:
            for entry in list_folder(pending.pop()):
                path = Path(entry.path)
                if entry.is_symlink():
                    links.append(path)
                elif identity(entry.stat()) not in linked:
                    seen.add(identity(entry.stat()))
                    append_by_kind(path, entry.stat(), pending, found)
        else:
            path = links.pop(0)
            status = follow(path)
            if status is not None and identity(status) not in seen:
                seen.add(identity(status))
                linked.add(identity(status))
                append_by_kind(path, status, pending, found)
    return sorted(found, key=lambda path: relative_name(path, root))


def list_folder(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder that may be text, in order; none if a training run or a cache
    has written the folder."""
    if is_run(folder) or (folder / CACHE_TAG).is_file():
        return []
    with os.scandir(folder) as entries:
        kept = [
            entry
            for entry in entries
            if not (entry.name.startswith(".") or entry.name in SKIPPED or is_leftover(entry.name))
        ]
    return sorted(kept, key=lambda entry: os.fsencode(entry.name))


def append_by_kind(
    path: Path, status: os.stat_result, folders: list[Path], files: list[Path]
) -> None:
    """Append a path to the folders or to the files. Devices, pipes and sockets are ignored."""
    if stat.S_ISDIR(status.st_mode):
        folders.append(path)
    elif stat.S_ISREG(status.st_mode):
        files.append(path)


def identity(status: os.stat_result) -> tuple[int, int]:
    """A key that is the same for all names of one file."""
    return status.st_dev, status.st_ino


def follow(link: Path) -> os.stat_result | None:
    """The target of a link; None if it does not exist or is the link itself."""
    try:
        return link.stat()
    except OSError:
        return None


def relative_name(path: Path, root: Path) -> bytes:
    """The path relative to the root, the same on every system; b"." for the root itself."""
    return os.fsencode(path.relative_to(root).as_posix())


def is_leftover(name: str) -> bool:
    """Whether a file or folder holds weights, or was left unfinished when its process ended."""
    return name.endswith((".partial", ".safetensors"))


def is_run(folder: Path) -> bool:
    """Whether a training run has written into a folder."""
    if any(folder.glob("checkpoints/step-*")):
        return True
    path = folder / "options.json"
    try:
        if not path.is_file() or path.stat().st_size > BLOCK:
            return False
        options = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(options, dict) and options.keys() >= OPTIONS


def runs_near(folder: Path) -> str:
    """ "did you mean runs/a or runs/b? " if a folder is in a training run or contains some,
    otherwise ""."""
    near = [folder.parent]
    with contextlib.suppress(OSError):
        near += sorted(folder.iterdir())
    runs = [str(each) for each in near if is_run(each)]
    return f"did you mean {' or '.join(runs[:2])}? " if runs else ""


class File(NamedTuple):
    """A regular file, its size in bytes, and its first bytes, which may be a byte order mark."""

    path: Path
    size: int
    start: bytes


def inspect_file(path: Path) -> File:
    """The path, size and first bytes of a file. Raises OSError if it cannot be read
    or is not a regular file."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        return File(path, status.st_size, file.read(4))


def fingerprint(files: dict[bytes, File]) -> str:
    """A fingerprint of a text: the number and total size of its files, and a hash of their
    names, sizes and contents.

    files: name -> file. The names are relative, so that a text may be moved. Every byte of a text
    of at most 256 MiB is read. Of a larger text, blocks of 64 KiB are read: the first and the last
    of every file, and evenly spread ones between them.
    """
    total = sum(file.size for file in files.values())
    stride = -(-total // WHOLE) * BLOCK
    digest = hashlib.blake2b(digest_size=8)
    for name, file in files.items():
        digest.update(len(name).to_bytes(8, "little") + name + file.size.to_bytes(8, "little"))
        with file.path.open("rb", buffering=0) as content:
            for place in places(file.size, stride):
                content.seek(place)
                digest.update(content.read(BLOCK))
    return f"{count_of(len(files), 'file')}, {total} bytes, {digest.hexdigest()}"


def places(size: int, stride: int) -> Iterator[int]:
    """Where to read the blocks of a file: at every stride, and at its end."""
    yield from range(0, size, max(stride, BLOCK))
    if stride > BLOCK and size > BLOCK:
        yield size - BLOCK


def count_of(number: int, noun: str) -> str:
    """ "1 file", "12,345 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(count: int) -> str:
    """Bytes in a suitable unit: "812 bytes", "11.6 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return count_of(count, "byte")
