"""Files that are complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from minimodels.errors import InputError


def read_json(path: Path, field: str | None = None) -> dict:
    """The JSON object in a file. Raises InputError, which names `field` or the file, if there is none."""
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
    """Write JSON; the file is complete, or as it was before."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Another path to write a file at, which then replaces the file, or disappears after an error.

    It is in a folder of its own, so that whatever a killed process left there, under any name, disappears
    the next time.
    """
    folder = path.with_name(path.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / path.name
        # as the umask has it, because safetensors keeps files private
        os.chmod(folder / path.name, folder.stat().st_mode & 0o666)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
