"""Save the model of a training run in the Hugging Face format, if a family has its layers.

    python -m minimodels.published RUN FOLDER

transformers and from_pretrained can load the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from minimodels.command import parse_options, run_command
from minimodels.data.tasks import is_task
from minimodels.errors import InputError
from minimodels.files import read_json
from minimodels.published import save_pretrained
from minimodels.training.checkpoint import load_model


@dataclass(frozen=True)
class Options:
    """Save the model of a training run in the Hugging Face format."""

    run: tyro.conf.Positional[Path]
    """folder of a training run, or of one of its checkpoints"""
    folder: tyro.conf.Positional[Path]
    """folder to write, new or empty"""


def main(options: Options) -> None:
    """Read the run and write the folder."""
    saved = options.run / "options.json"
    if saved.exists() and is_task(str(read_json(saved, "run").get("data"))):
        raise InputError("run", str(options.run), "a run on text; a task has answers, not text")
    save_pretrained(load_model(options.run), options.folder)
    print(f"saved in {options.folder}")


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
