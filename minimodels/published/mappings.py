"""How parts of our layers are stored in published files.

A mapping writes parts, and reads what it wrote. Mappings can be nested, as in
Transposed(Fused("attn.c_attn")).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimodels.published.family import Mapping


@dataclass(frozen=True)
class Plain:
    """One part, as it is."""

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: tensors[0]}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        tensors[0].copy_(stored(name))


@dataclass(frozen=True)
class Stacked:
    """Each expert as a tensor of its own, with its number instead of "*"."""

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name.replace("*", str(e)): expert for e, expert in enumerate(tensors[0])}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        for e, expert in enumerate(tensors[0]):
            expert.copy_(stored(name.replace("*", str(e))))


@dataclass(frozen=True)
class Fused:
    """Several parts as one tensor, one after the other."""

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
    """Several parts as one tensor: the first slice of each, then the second of each."""

    name: str
    dim: int = 0

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: torch.stack(tensors, self.dim + 1).flatten(self.dim, self.dim + 1)}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        parts = stored(name).unflatten(self.dim, (-1, len(tensors)))
        for tensor, part in zip(tensors, parts.unbind(self.dim + 1), strict=True):
            tensor.copy_(part)


@dataclass(frozen=True)
class ByHead:
    """Several parts as one tensor: the first head's rows of each part, then the second head's."""

    name: str
    heads: int
    sizes: tuple[int, ...] = ()
    """the rows of each part in our first tensor, if that holds several parts"""

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """A view of each part in our tensors, with a dimension for the heads."""
        first = tensors[0].split(self.sizes or tensors[0].shape[0])
        return [part.unflatten(0, (self.heads, -1)) for part in (*first, *tensors[1:])]

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat(self.parts(tensors), dim=1).flatten(0, 1)}

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        parts = self.parts(tensors)
        rows = stored(name).unflatten(0, (self.heads, -1)).split([p.shape[1] for p in parts], 1)
        for part, row in zip(parts, rows, strict=True):
            part.copy_(row)


@dataclass(frozen=True)
class Apart:
    """One part as several tensors, each with a letter instead of "*"; equal in size by default."""

    name: str
    letters: str
    sizes: tuple[int, ...] = ()

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self.sizes) if self.sizes else tensor.chunk(len(self.letters))

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("*", letter): part
            for letter, part in zip(self.letters, self.parts(tensors[0]), strict=True)
        }

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        for letter, part in zip(self.letters, self.parts(tensors[0]), strict=True):
            part.copy_(stored(name.replace("*", letter)))


class Changed:
    """What another mapping stores, changed by a function that has an inverse."""

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
    """A norm's weights minus 1, because the published norm multiplies by 1 + w.

    In 16 bits our 1 + w has fewer digits than w.
    """

    def to_file(self, tensor: Tensor) -> Tensor:
        return (tensor.double() - 1).to(tensor.dtype)

    def from_file(self, tensor: Tensor) -> Tensor:
        return tensor.double() + 1


class Shaped(Changed):
    """A row of numbers in another shape."""

    def __init__(self, stored_as: Mapping | str, shape: tuple[int, ...]):
        super().__init__(stored_as)
        self.shape = shape

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.shape)

    def from_file(self, tensor: Tensor) -> Tensor:
        return tensor.flatten()


class Swapped(Changed):
    """The rows of heads with the halves of each head swapped, because the model rotates its pairs
    the other way round: it computes (x2, -x1) where others compute (-x2, x1)."""

    def __init__(self, stored_as: Mapping | str, heads: int):
        super().__init__(stored_as)
        self.heads = heads

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.heads, 2, -1)).flip(1).flatten(0, 2)

    from_file = to_file


class Transposed(Changed):
    """Matrices with inputs before outputs."""

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.ndim > 1 else tensor

    from_file = to_file


def mapping(stored_as: Mapping | str) -> Mapping:
    """The mapping that is given; a name means Plain, or Stacked if it has a "*"."""
    if not isinstance(stored_as, str):
        return stored_as
    return Stacked(stored_as) if "*" in stored_as else Plain(stored_as)
