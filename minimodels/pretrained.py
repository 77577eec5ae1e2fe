"""Published checkpoints in the Hugging Face format, read and written.

    model = from_pretrained("folder-or-hub/id")        an LM with the published weights
    save_pretrained(model, "folder")                   what transformers.AutoModelForCausalLM loads

Which models, and how they are put together, stands in minimodels/families.py. Only JSON and safetensors are read, so nothing
in a file can run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import write_json
from .config import Config, InputError, parse_layers
from .families import FAMILIES, IDLE, MEANINGS, ONLY, REQUIRED, Family
from .layouts import Entries, read_rope, write_rope
from .lm import LM, Published
from .mamba import dt_rank
from .moe import expert_width
from .transformer import mlp_width

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # tensors in older files that follow from config.json


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
    folder = locate(path_or_id, revision)
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
        if config.tie_embeddings:  # which a change of dtype has undone
            model.head.weight = model.embedding.weight
        for buffer in model.buffers():
            buffer.zero_()
        for name, tensor in published_tensors(model, family).items():
            tensor.copy_(files[name].read())
    model.published = Published(folder, {name: value for name, value in entries.items() if name not in ignore})
    return model.eval()


def save_pretrained(model: LM, path: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model into a new folder that transformers.AutoModelForCausalLM loads, and that gives the same logits.

    The family is the one that the model was read from, or else the first that can express it. What was read with it and is
    not part of Config (ids of special tokens, the tokenizer) is written again. Files hold up to `shard_bytes` bytes each.

    Raises InputError for a model that no family expresses, with each family's reason, and for a path that is taken.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError("path", str(path), "a folder that is new or empty")
    name, entries = write_config(model)
    entries["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(published_tensors(model, FAMILIES[name]), partial, shard_bytes)
    write_json(partial / CONFIG, entries)
    for file in TOKENIZER if model.published else ():
        if (model.published.folder / file).is_file():
            shutil.copyfile(model.published.folder / file, partial / file)
    os.replace(partial, path)


# config.json <-> Config.


def family_of(entries: dict) -> Family:
    """The family that a config.json names."""
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError("config.json model_type", name, ", ".join(FAMILIES))
    return FAMILIES[name]


def read_config(entries: dict, family: Family, ignore: Iterable[str] = (), overrides: dict | None = None) -> Config:
    """The Config that a config.json describes. Raises InputError on an entry that is missing, unknown or not implemented."""
    values = meaning(entries, family, ignore)
    known = {field.name for field in fields(Config)}
    for name in overrides or ():
        if name not in known:
            raise InputError("overrides", name, ", ".join(sorted(known)))
    try:
        return Config(**{**values, **(overrides or {})})
    except InputError as error:
        sources = [entry for entry, (targets, _) in family.entries.items() if error.field in targets.split()]
        raise InputError(f"config.json {sources[0] if sources else error.field}", error.value, error.accepted) from None


def meaning(entries: dict, family: Family, ignore: Iterable[str] = ()) -> dict[str, object]:
    """The fields of Config that a family speaks of, with what its config.json says of them."""
    entries = Entries({family.aliases.get(name, name): value for name, value in entries.items() if name not in ignore})
    for name, accepted in {**ONLY, **family.only}.items():
        if entries.get(name, accepted) != accepted:
            raise InputError(f"config.json {name}", entries.get(name), f"{accepted!r}, or no such entry")
    values = dict(family.fixed)
    for name, (targets, absent) in family.entries.items():
        value = entries.get(name, absent)
        if value is REQUIRED or (name in entries and type(value) is int and value < 1):  # 0 means something else in Config
            raise InputError(f"config.json {name}", entries.get(name), "1 or more" if name in entries else "a value")
        if isinstance(value, (str, int)):
            value = MEANINGS.get(name, {}).get(value, value)
        values |= dict.fromkeys(targets.split(), value)
    if family.rope_base:
        values |= read_rope(entries, family.rope_base)
    if "experts" in values:  # as transformers balances them, and where it does
        balanced, weight = entries.get("output_router_logits", False), entries.get("router_aux_loss_coef", 0.0)
        values |= {"balance": "pooled", "balance_loss": weight if balanced else 0.0, "z_loss": 0.0}
    values |= family.layers(entries)
    unknown = {name: value for name, value in entries.items() if name not in {*entries.asked, *IDLE, *family.idle}}
    if unknown:
        raise InputError("config.json", unknown, "entries known for this model_type, or named in `ignore` to be left out")
    return values


OBJECTIVE = {"balance", "balance_loss", "z_loss"}  # of training: not a part of the model


def write_config(model: LM) -> tuple[str, dict]:
    """The family's name and the config.json of a model. Raises InputError if no family expresses it."""
    reasons = {}
    origin = model.published.entries if model.published else {}
    for name in sorted(FAMILIES, key=lambda name: name != origin.get("model_type")):  # its own first
        try:
            return name, express(model.config, name, origin)
        except InputError as error:
            reasons[name] = str(error)
    raise InputError(
        "model", model.config.layers, "what a family expresses; " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
    )


def express(config: Config, name: str, origin: dict) -> dict:
    """The config.json of a family for a Config, beside what `origin` says. Raises InputError where it means another model."""
    family, config = FAMILIES[name], explicit(config)
    if origin.get("model_type") != name:
        origin = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # for the classes have defaults
    entries = {**origin, "model_type": name, "architectures": [family.architecture]}
    experts = any("experts" in targets.split() for targets, _ in family.entries.values())
    for entry, (targets, _) in family.entries.items():
        value = getattr(config, targets.split()[0])
        meanings = {ours: theirs for theirs, ours in MEANINGS.get(entry, {}).items()}
        entries[entry] = meanings.get(value, value)
    if family.rope_base:
        entries = {name: value for name, value in entries.items() if name not in ("rope_theta", "rope_scaling")}
        entries |= write_rope(config.rope_base, config.rope_scaling)
    if experts and config.balance_loss and config.balance == "pooled":
        entries |= {"output_router_logits": True, "router_aux_loss_coef": config.balance_loss}
    entries |= family.outline(parse_layers(config.layers), config.window)

    spoken = meaning(entries, family)
    again = explicit(Config(**spoken))
    for field in spoken.keys() - OBJECTIVE:
        told, meant = getattr(again, field), getattr(config, field)
        if told != meant and (field != "layers" or parse_layers(told) != parse_layers(meant)):
            raise InputError(field, meant, str(told))
    return entries


def explicit(config: Config) -> Config:
    """The same with every field spelled out that stood for something else at 0."""
    return replace(
        config,
        vocab=config.vocab or 256,
        kv_heads=config.kv_heads or config.heads,
        head_dim=config.head_dim or config.width // config.heads,
        mlp_width=mlp_width(config),
        expert_width=expert_width(config),
        dt_rank=dt_rank(config),
        mamba_norm_eps=config.mamba_norm_eps or config.norm_eps,
    )


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
        block, parts = family.block.format(int(index) // per_block), family.parts[layers[int(index)]]
        name = name.removeprefix("layer.")  # of Residual, whose norm stands beside it
        part, _, leaf = name.rpartition(".")
        published = block + (parts[name] if name in parts else f"{parts[part]}.{leaf}")
        if "*" in published:
            found |= {published.replace("*", str(e)): expert for e, expert in enumerate(tensor.detach())}
        else:
            found[published] = tensor.detach()
    return found


def open_tensors(folder: Path, family: Family, opened: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, single or sharded, by the names used here."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            raise InputError("folder", str(folder), f"one with {WEIGHTS} or {INDEX}; pickled weights are not read")
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            raise InputError(INDEX, str(folder / INDEX), "a weight_map from names to files of the same folder")
        names = sorted(set(shards.values()))
    found: dict[str, Stored] = {}
    for name in names:
        try:
            file = opened.enter_context(safe_open(folder / name, "pt"))
        except (SafetensorError, OSError) as error:
            raise InputError("weights", str(folder / name), f"a whole safetensors file ({error})") from None
        found |= {family.aliases.get(key, key): Stored(file, key) for key in file.keys()}  # noqa: SIM118
    return found


def check_tensors(files: dict[str, Stored], model: LM, family: Family, folder: Path) -> None:
    """Raise InputError that lists every tensor which is missing, surplus, of another shape or not of floating point."""
    wanted = published_tensors(model, family)
    head, embedding = (family.whole[part] + ".weight" for part in ("head", "embedding"))
    if head not in wanted and head in files and embedding in files:  # tied, and stored all the same
        if not torch.equal(files[head].read(), files[embedding].read()):
            raise InputError("config.json tie_word_embeddings", True, f"false, for {head} is not {embedding}")
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
        raise InputError("weights", str(folder), "the tensors that config.json describes; wrong: " + ", ".join(sorted(wrong)))


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write one file, or as many as it takes and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})


def locate(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a published model, fetched from the hub where it is no folder here."""
    name = str(path_or_id)
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError("path_or_id", name, "a folder with config.json and safetensors, or an id of the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError("path_or_id", name, 'a folder; for an id of the hub, pip install "minimodels[hub]"') from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, "*.safetensors", INDEX, *TOKENIZER]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError("path_or_id", name, f"a folder, or an id that the hub has ({reason})") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path.name, str(path), f"a file with a JSON object ({error})") from None
    if not isinstance(content, dict):
        raise InputError(path.name, str(path), "a file with a JSON object")
    return content
