"""Published checkpoints in the Hugging Face format, read and written.

    model = from_pretrained("folder-or-hub/id")        an LM with the published weights
    save_pretrained(model, "folder")                   what transformers.AutoModelForCausalLM loads

    python -m minimodels.pretrained RUN FOLDER         the same of a training run, if a family has its layers: those of the
                                                       presets transformer, mamba and moe, not mod or hybrid

Which models, and how they are put together, stands in minimodels/families.py. Only JSON and safetensors are read, so nothing
in a file can run.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimodels.command import run_command
from minimodels.config import parse_layers
from minimodels.errors import InputError
from minimodels.files import write_json
from minimodels.lm import LM
from minimodels.published.config_json import family_of, read_config, read_json, write_config
from minimodels.published.families import FAMILIES, Family
from minimodels.training.checkpoint import load_model

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = re.compile(
    r"\.rotary_emb\.inv_freq$"
)  # tensors in older files that follow from config.json


def from_pretrained(
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    ignore: Iterable[str] = (),
    **overrides: object,
) -> LM:
    """The published model in a folder, or of an id of the hub (with the extra `hub`), in evaluation mode.

    dtype: of the parameters; None: that of the embedding in the file. revision: branch, tag or commit on the hub. ignore:
    entries of config.json to leave out of account though they are unknown here. overrides: fields of Config to set otherwise,
    such as impl or balance_loss. Each tensor is read through a memory map straight into the model.

    Raises InputError for a model_type or an option that is not implemented, for files that are missing or damaged, and for
    tensors that are missing, surplus or of another shape, all of them at once.
    """
    folder, ignore = locate(path_or_id, revision), set(ignore)
    entries = read_json(folder / CONFIG)
    family = family_of(entries)
    config = read_config(entries, family, ignore, overrides)
    with ExitStack() as opened:
        files = open_tensors(folder, family, opened)
        with torch.device("meta"):
            model = LM(config)
        check_tensors(files, model, family, folder)
        if dtype is None:
            dtype = DTYPES[files[family.whole["embedding"] + ".weight"].dtype]
        model = model.to(dtype).to_empty(device=device)
        for buffer in model.buffers():
            buffer.zero_()
        for name, tensor in published_tensors(model, family).items():
            tensor.copy_(files[name].read())
    model.published = Published(
        folder, {name: value for name, value in entries.items() if name not in ignore}
    )
    return model.eval()


def save_pretrained(model: LM, path: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model into a new folder that transformers.AutoModelForCausalLM loads, and that gives the same logits.

    The family is the one that the model was read from, or else the first that can express it. What was read with it and is
    not part of Config (ids of special tokens, the tokenizer) is written again. Files hold up to `shard_bytes` bytes each.

    Raises InputError for a model that no family expresses, with each family's reason, and for a path that is taken or cannot be
    written.
    """
    name, entries = write_config(model.config, model.published.entries if model.published else {})
    entries["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    try:
        path = Path(path).resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("path", str(path), "a folder that is new or empty")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as partial:
            folder = Path(partial) / "model"
            folder.mkdir()
            write_tensors(published_tensors(model, FAMILIES[name]), folder, shard_bytes)
            write_json(folder / CONFIG, entries)
            for file in BESIDE if model.published else ():
                if (model.published.folder / file).is_file():
                    shutil.copyfile(model.published.folder / file, folder / file)
            os.replace(folder, path)
    except (OSError, SafetensorError) as error:
        raise InputError("path", str(path), f"a folder that can be written ({error})") from None


class Published(NamedTuple):
    """Where a model was read from and what its config.json says, kept for being saved again."""

    folder: Path
    entries: dict


# Tensors.


class Stored(NamedTuple):
    """A tensor in an open file."""

    file: safe_open
    name: str

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


@torch.no_grad()
def published_tensors(model: LM, family: Family) -> dict[str, Tensor]:
    """The model's own tensors under their published names; of stacked experts a view for each."""
    layers = parse_layers(model.config.layers)
    per_block = 2 if len(family.parts) > 1 else 1
    found = {}
    for name, tensor in model.named_parameters():
        part, _, leaf = name.rpartition(".")
        if not name.startswith("layers."):
            found[f"{family.whole[part]}.{leaf}"] = tensor.detach()
            continue
        _, index, name = name.split(".", 2)
        block, parts = (
            family.block.format(int(index) // per_block),
            family.parts[layers[int(index)]],
        )
        name = name.removeprefix("layer.")  # of Residual, whose norm stands beside it
        part, _, leaf = name.rpartition(".")
        published = block + (parts[name] if name in parts else f"{parts[part]}.{leaf}")
        if "*" in published:
            found |= {
                published.replace("*", str(e)): expert for e, expert in enumerate(tensor.detach())
            }
        else:
            found[published] = tensor.detach()
    return found


def open_tensors(folder: Path, family: Family, opened: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, single or sharded, by the names used here."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            raise InputError(
                "folder",
                str(folder),
                f"one with {WEIGHTS} or {INDEX}; pickled weights are not read",
            )
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            raise InputError(
                INDEX, str(folder / INDEX), "a weight_map from names to files of the same folder"
            )
        names = sorted(set(shards.values()))
    found: dict[str, Stored] = {}
    for name in names:
        try:
            file = opened.enter_context(safe_open(folder / name, "pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(
                "weights", str(folder / name), f"a whole safetensors file ({error})"
            ) from None
        found |= {family.aliases.get(key, key): Stored(file, key) for key in file.keys()}  # noqa: SIM118
    return found


def check_tensors(files: dict[str, Stored], model: LM, family: Family, folder: Path) -> None:
    """Raise InputError that lists every tensor which is missing, surplus, of another shape or not of floating point."""
    wanted = published_tensors(model, family)
    head, embedding = (family.whole[part] + ".weight" for part in ("head", "embedding"))
    if head not in wanted and head in files and embedding in files:  # tied, and stored all the same
        if not torch.equal(files[head].read(), files[embedding].read()):
            raise InputError(
                "config.json tie_word_embeddings", True, f"false, for {head} is not {embedding}"
            )
        del files[head]
    wrong = [f"{name}: missing" for name in wanted.keys() - files.keys()]
    for name, stored in files.items():
        if name not in wanted:
            wrong += [f"{name}: surplus"] * (not DERIVED.search(name))
        elif stored.shape != list(wanted[name].shape):
            wrong.append(f"{name}: {stored.shape} for {list(wanted[name].shape)}")
        elif stored.dtype not in DTYPES:
            wrong.append(f"{name}: {stored.dtype} for one of {', '.join(DTYPES)}")
    if wrong:
        raise InputError(
            "weights",
            str(folder),
            "the tensors that config.json describes; wrong: " + ", ".join(sorted(wrong)),
        )


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write one file, or as many as it takes and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if (
            shards[-1]
            and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes
        ):
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": weight_map,
            },
        )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})


def locate(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a published model, fetched from the hub where it is no folder here."""
    name = str(path_or_id)
    if name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError(
            "path_or_id", name, "a folder with config.json and safetensors, or an id of the hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            "path_or_id", name, 'a folder; for an id of the hub, pip install "minimodels[hub]"'
        ) from None
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[CONFIG, "*.safetensors", INDEX, *BESIDE]
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            "path_or_id", name, f"a folder, or an id that the hub has ({reason})"
        ) from None


@dataclass(frozen=True)
class Options:
    """Save the model of a training run in the Hugging Face format."""

    run: tyro.conf.Positional[Path]
    """folder of a training run"""
    folder: tyro.conf.Positional[Path]
    """folder to write, new or empty"""


def main(options: Options) -> None:
    """Read the run, write the folder."""
    save_pretrained(load_model(options.run), options.folder)
    print(f"saved in {options.folder}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
