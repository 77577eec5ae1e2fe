"""Tensors in safetensors files, and the parts of our model that they contain.

A mapping describes the stored form of some of our parts. Each one writes, and reads what it wrote.
They can be nested, such as Transposed(Fused("attn.c_attn")).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = re.compile(  # tensors in older files that follow from config.json
    r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)"
)

# The stored forms of parts.


@dataclass(frozen=True)
class Plain:
    """A tensor stored as it is."""

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: tensors[0]}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        tensors[0].copy_(stored(name))


@dataclass(frozen=True)
class Stacked:
    """Each expert stored separately, with its number instead of "*"."""

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name.replace("*", str(e)): expert for e, expert in enumerate(tensors[0])}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        for e, expert in enumerate(tensors[0]):
            expert.copy_(stored(name.replace("*", str(e))))


@dataclass(frozen=True)
class Fused:
    """Several parts concatenated to one tensor."""

    name: str
    dim: int = 0

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat(tensors, self.dim)}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        sizes = [tensor.shape[self.dim] for tensor in tensors]
        for tensor, part in zip(tensors, stored(name).split(sizes, self.dim), strict=True):
            tensor.copy_(part)


@dataclass(frozen=True)
class Interleaved:
    """Several parts as one tensor: the first slice of each, then the second of each, and so on."""

    name: str
    dim: int = 0

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: torch.stack(tensors, self.dim + 1).flatten(self.dim, self.dim + 1)}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        parts = stored(name).unflatten(self.dim, (-1, len(tensors)))
        for tensor, part in zip(tensors, parts.unbind(self.dim + 1), strict=True):
            tensor.copy_(part)


class Changed:
    """A tensor stored by another mapping, after a function that has an inverse."""

    def __init__(self, stored_as: Mapping | str):
        self.inner = mapping(stored_as)
        self.name = self.inner.name

    def to_file(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def from_file(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        written = self.inner.write(name, tensors)
        return {key: self.to_file(tensor) for key, tensor in written.items()}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        self.inner.read(name, lambda key: self.from_file(stored(key)), tensors)


class Offset(Changed):
    """A norm's weights less 1, because the norm multiplies by 1 + w.

    In 16 bits 1 + w has fewer digits than w.
    """

    def to_file(self, tensor: Tensor) -> Tensor:
        return (tensor.double() - 1).to(tensor.dtype)

    def from_file(self, tensor: Tensor) -> Tensor:
        return tensor.double() + 1


class Transposed(Changed):
    """Matrices stored with inputs before outputs."""

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.ndim > 1 else tensor

    from_file = to_file


def mapping(stored_as: Mapping | str) -> Mapping:
    """A mapping from its name.

    Text is the name of a tensor that is stored as it is, or for each expert if it has a "*".
    """
    if not isinstance(stored_as, str):
        return stored_as
    return Stacked(stored_as) if "*" in stored_as else Plain(stored_as)


# The model's own tensors.


class Binding(NamedTuple):
    """Some of the model's tensors, and their stored form."""

    mapping: Mapping
    name: str  # complete
    tensors: list[Tensor]


def bindings(model: LM, family: Family, roles: list[str]) -> list[Binding]:
    """The stored form of every tensor of a model; `roles` are those of its layers.

    Raises InputError if a part has no name.
    """
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
        found += bind(inside, role.parts, block) + bind(outside, role.residual, block)
    return found


def bind(tensors: dict[str, Tensor], table: dict[str, Mapping | str], prefix: str) -> list[Binding]:
    """The tensors of one table."""
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
    """All tensors in their stored form, by their names.

    A tensor that is stored as it is, is a view of the model's.
    """
    found: dict[str, Tensor] = {}
    for how, name, tensors in bound:
        found |= how.write(name, tensors)
    return found


@torch.no_grad()
def read_tensors(bound: list[Binding], files: dict[str, Stored]) -> None:
    """Copy the stored tensors into the model."""
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
    """A tensor in MXFP4 (OCP Microscaling Formats 1.0).

    Its numbers have 4 bits, and 32 of them share a power of 2. blocks (E, out, in / 32, 16) have
    two numbers a byte, the low bits first; scales (E, out, in / 32). Reading it gives (E, in, out).
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
    """The tensors, with each pair of blocks and scales in MXFP4 replaced by one tensor."""
    found: dict[str, Stored | Packed] = dict(files)
    for name in [name for name in files if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        if f"{whole}_scales" in files and len(files[name].shape) == 4:
            found[whole] = Packed(found.pop(name), found.pop(f"{whole}_scales"))
    return found


def open_tensors(folder: Path, opened: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, single or sharded."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
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
    """The stored tensors by the names used here, whatever the file calls them.

    A file may have older names. A model saved without its head has no prefix. A tied matrix may
    have only the head's name.
    """
    files = {family.aliases.get(name, name): stored for name, stored in unpack(files).items()}
    head, embedding = weight_of(family, "head"), weight_of(family, "embedding")
    if not any(name.startswith(family.prefix) for name in files):
        files = {
            name if name == head else family.prefix + name: stored for name, stored in files.items()
        }
    if tied and head in files and embedding not in files:
        files[embedding] = files.pop(head)
    return files


def weight_of(family: Family, part: str) -> str:
    """The stored name of the embedding's or the head's matrix."""
    return mapping(family.whole[part]).name + ".weight"


def block_of(name: str, family: Family) -> int:
    """The number of the block to which a stored tensor belongs; -1 for none."""
    pattern = re.escape(family.prefix + family.block).replace(re.escape("{}"), r"(\d+)")
    found = re.match(pattern, name)
    return int(found[1]) if found else -1


def check_tensors(
    files: dict[str, Stored], wanted: dict[str, Tensor], family: Family, folder: Path
) -> None:
    """Raise InputError if tensors are missing, surplus, of another shape or not floating-point.

    The error lists all of them.
    """
    head, embedding = weight_of(family, "head"), weight_of(family, "embedding")
    # tied, but stored nevertheless
    if head not in wanted and head in files and embedding in files:
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
            wrong.append(f"{name}: {stored.shape} for {list(wanted[name].shape)}")
        elif stored.dtype not in DTYPES:
            wrong.append(f"{name}: {stored.dtype} for one of {', '.join(DTYPES)}")
    if wrong:
        accepted = "the tensors that config.json describes; wrong: " + ", ".join(sorted(wrong))
        raise InputError("weights", str(folder), accepted)


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write one file, or several and their index."""
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
