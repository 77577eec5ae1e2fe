"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that the file is whole, or as it was before."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to write a file at: it then takes the file's place, or after an error goes away. It lies in a folder of its
    own, so that whatever a killed process left there, under any name, goes away the next time."""
    folder = path.with_name(path.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / path.name
        os.chmod(
            folder / path.name, folder.stat().st_mode & 0o666
        )  # as the umask has it: safetensors keeps files private
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
