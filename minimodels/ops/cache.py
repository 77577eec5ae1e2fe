"""The KV cache: what attention remembers, in memory with room to grow.

`carry` appends a chunk's keys and values to the remembered ones. If gradients may flow, it copies
both into new tensors. In generation it writes them into free slots after the used ones (`Room`), so
a token does not cost a copy of the whole text. In a memory of fixed size (`slotted`) each token is
written into the slot of its position.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# free slots of a new room, or 1/8 of the used ones if that is more, so that tokens rarely move
SPARE = 64


class AttentionState(NamedTuple):
    """What attention remembers.

    If all rows are texts without gaps or padding, the slots are the last S tokens and `seen` is a
    number. If positions were given, a slot at position -1 is empty and is never attended to, and
    `seen` is (B,) int64.
    """

    keys: Tensor  # (B, G, S, d), rotated
    values: Tensor  # (B, G, S, d)
    positions: Tensor | None  # (B, S) int64, ascending except for the empty slots
    seen: Tensor | int  # the position of the next token
    # the memory that contains the slots, if it has free slots after them; SLOTTED: each token is
    # written into the slot of its position
    room: Room | str | None = None


SLOTTED = "slotted"


def advance(
    seen: Tensor | int, x: Tensor, positions: Tensor | None, starts: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | int]:
    """The positions of a chunk x (B, T, D), those within documents, and the one after the chunk.

    The positions within documents are for the rotation. If all rows are texts without gaps or
    padding, the first result is None, the second is (T,), and the third is a number. Otherwise the
    second is (B, 1, T).
    """
    T = x.shape[1]
    if positions is None and isinstance(seen, int):  # the same in every row
        return None, torch.arange(seen, seen + T, device=x.device), seen + T
    if positions is None:
        positions = seen[:, None] + torch.arange(T, device=x.device)  # (B, T)
    turned = (positions if starts is None else positions - starts).unsqueeze(1)  # (B, 1, T)
    return positions, turned, (positions.amax(1) + 1).clamp(min=seen)


def carry(
    before: AttentionState | None, now: AttentionState, window: int | None
) -> tuple[AttentionState, AttentionState]:
    """The slots that a chunk attends to, and what is remembered after it.

    The chunk's own slots come after the remembered ones.
    """
    # empty slots stay, because counting them would make every training step wait for the GPU
    if before is None:
        return now, compact(now, window, count=False)
    if before.room == SLOTTED:
        return (write(before, now),) * 2
    if now.positions is not None and before.positions is None:
        slots = torch.arange(
            before.seen - before.keys.shape[2], before.seen, device=now.keys.device
        )
        before = AttentionState(
            before.keys, before.values, slots.expand(now.keys.shape[0], -1), before.seen
        )
    # whether nothing of what was remembered is kept
    replaced = window is not None and now.keys.shape[2] >= window
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or replaced:
        keys, values = (torch.cat(parts, dim=2) for parts in zip(before[:2], now[:2], strict=True))
        positions = (
            None if now.positions is None else torch.cat((before.positions, now.positions), dim=1)
        )
        joined = AttentionState(keys, values, positions, now.seen)
        return joined, compact(joined, window)
    room = before.room
    if room is None or not room.claim(before, now):
        before = compact(before, window)
        room = Room(before, now)
    return room.append(before, now, window)


def compact(state: AttentionState, window: int | None, count: bool = True) -> AttentionState:
    """Drop what no later token can see.

    With a window this keeps window - 1 tokens. If `count` is true, it also drops slots that are
    empty in every row.
    """
    keys, values, positions, seen, _ = state
    slots = keys.shape[2]
    keep = slots
    if window is not None and not torch.compiler.is_exporting():  # min would bound the length
        keep = min(slots, window - 1)
    if positions is not None:
        # empty slots first, because slots are dropped at the front
        positions, order = positions.sort(dim=1, stable=True)
        index, empty = order[:, None, :, None], (positions < 0)[:, None, :, None]
        keys, values = (
            part.gather(2, index.expand_as(part)).masked_fill(empty, 0) for part in (keys, values)
        )
        if count:
            keep = min(keep, int((positions >= 0).sum(1).amax()))
    if keep < slots:  # cloned, because a view would keep the dropped slots in memory
        keys, values = (part[:, :, slots - keep :].clone() for part in (keys, values))
        positions = None if positions is None else positions[:, slots - keep :].clone()
    return AttentionState(keys, values, positions, seen)


def slotted(state: AttentionState, count: int) -> AttentionState:
    """A copy of a state with room for `count` more tokens, which `carry` writes in place.

    It is for chunks of one token. The slot of a token is its position, whatever the window. Slots
    without a token are empty. So no tensor changes its address or its size, but earlier states
    become invalid.
    """
    keys, values, positions, seen, _ = state
    B, S = len(keys), keys.shape[2]
    if positions is None:
        positions = torch.arange(seen - S, seen, device=keys.device).expand(B, S)
        seen = torch.full((B,), seen, device=keys.device)
    slots = count + (int(seen.amax()))
    # empty slots go into an extra slot, which is cut off
    place = positions.masked_fill(positions < 0, slots)  # (B, S)
    at = place[:, None, :, None]

    def spread(x: Tensor) -> Tensor:
        memory = x.new_zeros(B, x.shape[1], slots + 1, x.shape[3])
        return memory.scatter_(2, at.expand_as(x), x)[:, :, :slots]

    positions = positions.new_full((B, slots + 1), -1).scatter_(1, place, positions)[:, :slots]
    return AttentionState(spread(keys), spread(values), positions, seen.clone(), SLOTTED)


def write(before: AttentionState, now: AttentionState) -> AttentionState:
    """Write the tokens of `now` into the slotted state `before`, and return it."""
    at = now.positions[:, None, :, None]  # (B, 1, T, 1)
    for memory, new in zip(before[:2], now[:2], strict=True):
        memory.scatter_(2, at.expand_as(new), new)
    before.positions.scatter_(1, now.positions, now.positions)
    return before._replace(seen=now.seen)


class Room:
    """Memory with free slots, so that a new token does not cost a copy of all tokens before it.

    It is used only if nothing is differentiated. Used slots are never overwritten, and only the
    newest state can be extended, once. An earlier state, a copy of a state, or a state of some of
    its rows gets a room of its own. So every state stays valid, also after an error and with
    several threads.
    """

    # the tensors of the newest state; None: claimed, or never given out
    newest: tuple | None = None

    def __init__(self, state: AttentionState, now: AttentionState):
        self.lock = threading.Lock()
        self.used = state.keys.shape[2]
        free = now.keys.shape[2] + max(SPARE, self.used // 8)
        dtype = torch.promote_types(state.keys.dtype, now.keys.dtype)  # as torch.cat would
        self.keys, self.values = (F.pad(part.to(dtype), (0, 0, 0, free)) for part in state[:2])
        self.positions = None if state.positions is None else F.pad(state.positions, (0, free))

    def __reduce__(self):
        return type(None), ()  # a copy of a state, also in another process, has no room

    def claim(self, before: AttentionState, now: AttentionState) -> bool:
        """Claim the slots after `before` for `now`. Returns whether this succeeded.

        Each state can be claimed only once.
        """
        writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        exact = torch.promote_types(self.keys.dtype, now.keys.dtype) == self.keys.dtype
        fits = self.used + now.keys.shape[2] <= self.keys.shape[2]
        if not (writable and exact and fits):
            return False
        with self.lock:
            newest = self.newest
            if newest is None or any(
                mine is not given for mine, given in zip(newest, before[:3], strict=True)
            ):
                return False
            self.newest = None
            return True

    def append(
        self, before: AttentionState, now: AttentionState, window: int | None
    ) -> tuple[AttentionState, AttentionState]:
        """The results of `carry`, written into this room.

        With positions, slots that are empty or outside the window stay until the room is full.
        """
        first, start = self.used - before.keys.shape[2], self.used
        self.used += now.keys.shape[2]
        self.keys[:, :, start : self.used] = now.keys
        self.values[:, :, start : self.used] = now.values
        if self.positions is not None:
            self.positions[:, start : self.used] = now.positions

        def state(first: int) -> AttentionState:
            keys, values = (part[:, :, first : self.used] for part in (self.keys, self.values))
            positions = None if self.positions is None else self.positions[:, first : self.used]
            return AttentionState(keys, values, positions, now.seen, self)

        joined = after = state(first)
        oldest = first if window is None or self.positions is not None else self.used - window + 1
        if oldest > first:
            after = state(oldest)
        self.newest = after[:3]
        return joined, after
