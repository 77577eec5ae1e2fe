"""from_pretrained and save_pretrained: a folder or an id of the hub <-> a model.

Only JSON and safetensors are read, so no code in a file can run.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from minimodels.data.files import is_run, runs_near
from minimodels.data.tokenizer import Bytes
from minimodels.errors import InputError
from minimodels.files import read_json, write_json
from minimodels.lm import LM
from minimodels.published.config_json import assign, family_of, read_config, write_config
from minimodels.published.families import FAMILIES
from minimodels.published.tensors import (
    DTYPES,
    INDEX,
    bindings,
    check_tensors,
    open_tensors,
    published_tensors,
    read_tensors,
    rename_tensors,
    weight_of,
    write_tensors,
)

CONFIG = "config.json"
ACCEPTED = (
    "a published model: a folder with config.json and safetensors, or OWNER/NAME on the hub; or, "
    "for load_model and the commands, a run: a folder with options.json and checkpoints"
)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
    "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


class Published(NamedTuple):
    """The folder of a published model and its config.json, for saving the model again."""

    folder: Path
    entries: dict


def from_pretrained(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    ignore: Iterable[str] = (),
    set: Iterable[str] = (),
    **overrides: object,
) -> LM:
    """The published model in a folder or with an id of the hub, in evaluation mode.

    Ids of the hub need the extra `hub`. dtype: that of the parameters, or its name; None or "auto"
    means that of the stored embedding. revision: branch, tag or commit on the hub. ignore:
    entries of config.json to ignore although they are unknown here. set: options of layers, such as
    "moe.balance_loss=0". overrides: fields of Config to change, such as impl. Each tensor is read
    through a memory map straight into the model.

    Raises InputError if a model_type or an option is not implemented, if files are missing or
    damaged, and if tensors are missing, surplus or of the wrong shape; one error lists them all.
    """
    dtype, device = read_dtype(dtype), read_device(device)
    folder, ignore = locate(path_or_id, revision), frozenset(ignore)
    entries = read_json(folder / CONFIG)
    family = family_of(entries)
    config = read_config(entries, family, ignore, set, overrides)
    roles = [role for role, _ in assign(config, family)]
    with ExitStack() as opened:
        files = rename_tensors(open_tensors(folder, opened), family, config.tie_embeddings)
        with torch.device("meta"):
            model = LM(config)
        check_tensors(files, published_tensors(bindings(model, family, roles)), family, folder)
        if dtype is None:
            dtype = DTYPES[files[weight_of(family, "embedding")].dtype]
        model = model.to(dtype).to_empty(device=device)
        for buffer in model.buffers():
            buffer.zero_()
        read_tensors(bindings(model, family, roles), files)
    kept = {name: value for name, value in entries.items() if name not in ignore}
    model.published = Published(folder, kept)
    return model.eval()


def save_pretrained(model: LM, path: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model into a new folder that transformers.AutoModelForCausalLM can load.

    The loaded model gives the same logits. The family is the one from which the model was read, or
    the first that can express it. What was read with the model but is not part of Config (ids of
    special tokens, the tokenizer) is written again. Files have up to `shard_bytes` bytes each.

    Raises InputError if no family can express the model, with what differs from the closest ones,
    and if the path is neither new nor an empty folder, or cannot be written.
    """
    name, entries = write_config(model.config, model.published.entries if model.published else {})
    entries["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    roles = [role for role, _ in assign(model.config, FAMILIES[name])]
    tensors = published_tensors(bindings(model, FAMILIES[name], roles))
    try:
        path = Path(path).resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("path", str(path), "a folder that is new or empty")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as partial:
            folder = Path(partial) / "model"
            folder.mkdir()
            write_tensors(tensors, folder, shard_bytes)
            write_json(folder / CONFIG, entries)
            write_tokenizer(model, folder)
            os.replace(folder, path)
    except (OSError, SafetensorError) as error:
        raise InputError("path", str(path), f"a folder that can be written ({error})") from None


def write_tokenizer(model: LM, folder: Path) -> None:
    """Write the files of the model's tokenizer.

    These are the files with which it was published, its own, or those for plain bytes.
    """
    tokenizer = model.tokenizer
    if model.published:
        for file in TOKENIZER:
            if (model.published.folder / file).is_file():
                shutil.copyfile(model.published.folder / file, folder / file)
    elif tokenizer is not None:
        tokenizer.save(folder)
    elif model.vocab >= 256:
        Bytes().save(folder)


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype; None for "auto"."""
    known = {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in known:
        return known[dtype.removeprefix("torch.")]
    if dtype not in (None, "auto", *known.values()):
        raise InputError("dtype", dtype, ", ".join(("auto", *known)))
    return None if dtype == "auto" else dtype


def read_device(device: str | torch.device) -> torch.device:
    """A device that exists."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("device", str(device), f"a device of this machine ({reason})") from None
    return device


def locate(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a published model: a folder here, or OWNER/NAME from the hub.

    If there is a folder OWNER here, the name is not looked up on the hub, because it was meant as a
    path.
    """
    name, folder = str(path_or_id), Path(path_or_id)
    if name and folder.is_dir():
        if (folder / CONFIG).exists():
            return folder
        reason = "this is a run" if is_run(folder) else "this folder is neither"
        raise InputError("model", name, f"{runs_near(folder)}{ACCEPTED} ({reason})")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name.partition("/")[0]).is_dir():
        raise InputError("model", name, f"{ACCEPTED} (there is no such folder)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        accepted = 'a folder; for an id of the hub, pip install -e ".[hub]"'
        raise InputError("model", name, accepted) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[CONFIG, "*.safetensors", INDEX, *TOKENIZER],
                ignore_patterns=["*/*", "consolidated*", "adapter_*"],
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        accepted = f"a folder, or an id that the hub has ({reason})"
        raise InputError("model", name, accepted) from None
