"""Weights to start from (`--init`): those of a run, of one of its checkpoints, or of a published
model."""

from __future__ import annotations

from pathlib import Path

import torch

from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.published import from_pretrained
from minimodels.training import checkpoint


def open_initial(name: str) -> tuple[LM, str]:
    """A model with its weights, and its value of --tokenizer.

    name: the folder of a run, a checkpoint or a published model, or the id of a published model.
    Raises InputError if there is no such model.
    """
    folder = Path(name)
    if (checkpoint.home(folder) / "options.json").exists():
        model = checkpoint.load_model(folder)
        return model, "bytes" if model.tokenizer is None else str(checkpoint.home(folder))
    try:
        model = from_pretrained(name, torch.float32)
    except InputError as error:
        if error.field != "model":
            raise
        raise InputError("init", error.value, error.accepted) from None
    return model, str(model.published.folder)


def copy_weights(model: LM, name: str) -> None:
    """Give a model the weights of another. Raises InputError if their configurations differ."""
    initial, _ = open_initial(name)
    changed = checkpoint.differing_fields(initial.config, model.config)
    if changed:
        raise InputError(
            "init", name, f"a model like the one to train; it has {'; '.join(changed)}"
        )
    model.load_state_dict(initial.state_dict())
