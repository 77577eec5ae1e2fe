"""Save the model of a training run in the Hugging Face format, if a family has its layers.

    python -m minimodels.published RUN FOLDER

transformers and from_pretrained can load the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from minimodels.command import parse_options, run_command
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
    save_pretrained(load_model(options.run), options.folder)
    print(f"saved in {options.folder}")


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
