"""Bind the tensors of safetensors files to the parts of our model; read, check and write them."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimodels.errors import InputError
from minimodels.files import read_json, write_json
from minimodels.lm import LM
from minimodels.published.family import Family, Mapping
from minimodels.published.mappings import mapping

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = re.compile(  # stored tensors whose values follow from config.json
    r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|slope_rate|(query|key|diagonal)_decay)"
)

# The model's own tensors.


class Binding(NamedTuple):
    """Some of the model's tensors, and how they are stored."""

    mapping: Mapping
    name: str  # complete
    tensors: list[Tensor]


def bindings(model: LM, family: Family, roles: list[str]) -> list[Binding]:
    """How every tensor of a model is stored; `roles` are those of its layers. Raises InputError for a part without a name."""
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("layers.")}
    found = bind(own, family.whole, "")
    for index, (name, layer) in enumerate(zip(roles, model.layers, strict=True)):
        role, row = family.roles[name], index - len(family.leading)
        if row < 0:
            found += bind(layer.state_dict(), role.parts, family.prefix)
            continue
        block = family.prefix + family.block.format(row // len(family.places))
        state = layer.state_dict()
        inside = {k.removeprefix("layer."): t for k, t in state.items() if k.startswith("layer.")}
        outside = {k: t for k, t in state.items() if not k.startswith("layer.")}
        parts = {part: of(layer.layer) if callable(of) else of for part, of in role.parts.items()}
        found += bind(inside, parts, block) + bind(outside, role.residual, block)
    return found


def bind(tensors: dict[str, Tensor], table: dict[str, Mapping | str], prefix: str) -> list[Binding]:
    """Bind tensors as one table says."""
    found, left = [], dict(tensors)
    for parts, stored_as in table.items():
        how, names = mapping(stored_as), parts.split()
        for leaf in ("", ".weight", ".bias"):
            if any(part + leaf in left for part in names):
                group = [left.pop(part + leaf) for part in names]
                found.append(Binding(how, prefix + how.name + leaf, group))
    if left:
        raise InputError("model", ", ".join(left), "parts that the family has")
    return found


@torch.no_grad()
def published_tensors(bound: list[Binding]) -> dict[str, Tensor]:
    """All tensors in their stored form, by name; unchanged ones share the model's memory."""
    found: dict[str, Tensor] = {}
    for how, name, tensors in bound:
        found |= how.write(name, tensors)
    return found


@torch.no_grad()
def read_tensors(bound: list[Binding], files: dict[str, Stored]) -> None:
    """Copy what is stored into the model."""
    for how, name, tensors in bound:
        how.read(name, lambda key: files[key].read(), tensors)


# Files.


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


class Packed(NamedTuple):
    """A tensor in MXFP4 (OCP Microscaling Formats 1.0): numbers of 4 bits, 32 of which share a power of 2.

    blocks (E, out, in / 32, 16) has two numbers in each byte, the one in the low bits first.
    scales is (E, out, in / 32). The tensor is read as (E, in, out).
    """

    blocks: Stored
    scales: Stored
    dtype = "BF16"

    @property
    def shape(self) -> list[int]:
        experts, outputs, groups, _ = self.blocks.shape
        return [experts, 32 * groups, outputs]

    def read(self) -> Tensor:
        blocks, exponents = self.blocks.read(), self.scales.read().int() - 127
        magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.bfloat16)
        values = torch.cat((magnitudes, -magnitudes))
        numbers = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1)
        return torch.ldexp(numbers.flatten(-2), exponents.unsqueeze(-1)).flatten(-2).mT


def unpack(files: dict[str, Stored]) -> dict[str, Stored | Packed]:
    """The tensors, with one for each pair of blocks and scales in MXFP4."""
    found: dict[str, Stored | Packed] = dict(files)
    for name in [name for name in files if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        if f"{whole}_scales" in files and len(files[name].shape) == 4:
            found[whole] = Packed(found.pop(name), found.pop(f"{whole}_scales"))
    return found


def open_tensors(folder: Path, opened: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, single or sharded."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            accepted = f"one with {WEIGHTS} or {INDEX}; pickled weights are not read"
            raise InputError("folder", str(folder), accepted)
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            accepted = "a weight_map from names to files of the same folder"
            raise InputError(INDEX, str(folder / INDEX), accepted)
        names = sorted(set(shards.values()))
    found: dict[str, Stored] = {}
    for name in names:
        try:
            if (folder / name).exists() and not (folder / name).is_file():
                raise OSError("not a regular file")
            file = opened.enter_context(safe_open(folder / name, "pt"))
        except (SafetensorError, OSError) as error:
            accepted = f"a whole safetensors file ({error})"
            raise InputError("weights", str(folder / name), accepted) from None
        found |= {key: Stored(file, key) for key in file.keys()}  # noqa: SIM118
    return found


def rename_tensors(files: dict[str, Stored], family: Family, tied: bool) -> dict[str, Stored]:
    """The stored tensors by the names used here.

    A file may use older names, lack the head and hence the prefix, or have a tied matrix only under
    the head's name.
    """
    files = {name_here(name, family): stored for name, stored in unpack(files).items()}
    head, embedding = weight_of(family, "head"), weight_of(family, "embedding")
    if not any(name.startswith(family.prefix) for name in files):
        files = {
            name if name == head else family.prefix + name: stored for name, stored in files.items()
        }
    if tied and head in files and embedding not in files:
        files[embedding] = files.pop(head)
    return files


def name_here(name: str, family: Family) -> str:
    """A stored tensor's name as it is used here; aliases of parts of blocks have {} for the block's number."""
    number = f".{block_of(name, family)}."
    pattern = name.replace(number, ".{}.", 1)
    return family.aliases.get(name, family.aliases.get(pattern, name)).replace(".{}.", number, 1)


def weight_of(family: Family, part: str) -> str:
    """The stored name of the embedding's or the head's matrix."""
    return mapping(family.whole[part]).name + ".weight"


def block_of(name: str, family: Family) -> int:
    """The number of the block that a stored tensor belongs to; -1 for none."""
    pattern = re.escape(family.prefix + family.block).replace(re.escape("{}"), r"(\d+)")
    found = re.match(pattern, name)
    return int(found[1]) if found else -1


def check_tensors(
    files: dict[str, Stored], wanted: dict[str, Tensor], family: Family, folder: Path
) -> None:
    """Raise InputError that lists tensors that are missing, surplus or of wrong shape or dtype."""
    head, embedding = weight_of(family, "head"), weight_of(family, "embedding")
    if head not in wanted and head in files and embedding in files:  # tied, but stored nevertheless
        if not torch.equal(files[head].read(), files[embedding].read()):
            accepted = f"false, because {head} is not {embedding}"
            raise InputError("config.json tie_word_embeddings", True, accepted)
        del files[head]
    wrong = [f"{name}: missing" for name in wanted.keys() - files.keys()]
    last = max((block_of(name, family) for name in wanted), default=-1)
    for name, stored in files.items():
        if name not in wanted:
            left_out = family.more_blocks and block_of(name, family) > last
            wrong += [] if left_out or DERIVED.fullmatch(name) else [f"{name}: surplus"]
        elif stored.shape != list(wanted[name].shape):
            wrong.append(f"{name}: {stored.shape} instead of {list(wanted[name].shape)}")
        elif stored.dtype not in DTYPES:
            wrong.append(f"{name}: {stored.dtype} instead of one of {', '.join(DTYPES)}")
    if wrong:
        accepted = "the tensors that config.json describes; wrong: " + ", ".join(sorted(wrong))
        raise InputError("weights", str(folder), accepted)


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write one file, or as many as it takes and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        used = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
