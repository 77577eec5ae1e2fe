"""The KV cache: what attention remembers, and memory that grows ahead of it.

A chunk's keys and values go behind those remembered (`carry`). Where gradients may flow they are joined by a copy; in
generation they are written into free slots behind them (`Room`), so that a token does not cost a copy of the whole text.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPARE = 64  # free slots of a new room, or an eighth of those in use if that is more: moving then costs each token little


class AttentionState(NamedTuple):
    """What attention remembers.

    Where all rows are texts without gaps or padding, the slots are the last S tokens, and `seen` is a number. Where positions
    were given, a slot at position -1 holds nothing and is never attended to, and `seen` is (B,) int64.
    """

    keys: Tensor  # (B, G, S, d), rotated
    values: Tensor  # (B, G, S, d)
    positions: Tensor | None  # (B, S) int64, ascending but for the empty slots
    seen: Tensor | int  # the position of the next token
    room: Room | None = (
        None  # the memory that the slots lie in, where there is more of it behind them
    )


def advance(
    seen: Tensor | int, x: Tensor, positions: Tensor | None, starts: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | int]:
    """Where a chunk x (B, T, D) is: its positions, those within each document for rotation, and the position after it.

    The positions are None, and the third a number, if all rows are texts without gaps or padding; those for rotation are
    (T,) then, else (B, 1, T).
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
    """The slots that a chunk attends to, its own behind those remembered before, and what is remembered after it."""
    if (
        before is None
    ):  # empty slots stay: to count them, every training step would have to wait for the GPU
        return now, compact(now, window, count=False)
    if now.positions is not None and before.positions is None:
        slots = torch.arange(
            before.seen - before.keys.shape[2], before.seen, device=now.keys.device
        )
        before = AttentionState(
            before.keys, before.values, slots.expand(now.keys.shape[0], -1), before.seen
        )
    replaced = (
        window is not None and now.keys.shape[2] >= window
    )  # nothing of what was remembered is kept
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
    """Drop what no later token can see: all but window - 1 tokens and, if they may be counted, slots empty in every row."""
    keys, values, positions, seen, _ = state
    slots = keys.shape[2]
    keep = slots if window is None else min(slots, window - 1)
    if positions is not None:
        positions, order = positions.sort(
            dim=1, stable=True
        )  # empty slots first: what is dropped is dropped there
        index, empty = order[:, None, :, None], (positions < 0)[:, None, :, None]
        keys, values = (
            part.gather(2, index.expand_as(part)).masked_fill(empty, 0) for part in (keys, values)
        )
        if count:
            keep = min(keep, int((positions >= 0).sum(1).amax()))
    if keep < slots:  # cloned, for a view would keep what is dropped in memory
        keys, values = (part[:, :, slots - keep :].clone() for part in (keys, values))
        positions = None if positions is None else positions[:, slots - keep :].clone()
    return AttentionState(keys, values, positions, seen)


class Room:
    """Memory with free slots behind those in use, so that one more token is not a copy of all before it.

    Used only where nothing is differentiated. What is in use is never overwritten, and only the newest state is written
    behind, once: an earlier one, a copy or one of some of its rows begins a room of its own. So every state stays good, after
    an error and among threads too.
    """

    newest: tuple | None = (
        None  # the tensors of the newest state; None: claimed, or never given out
    )

    def __init__(self, state: AttentionState, now: AttentionState):
        self.lock = threading.Lock()
        self.used = state.keys.shape[2]
        free = now.keys.shape[2] + max(SPARE, self.used // 8)
        dtype = torch.promote_types(state.keys.dtype, now.keys.dtype)  # as if they were joined
        self.keys, self.values = (F.pad(part.to(dtype), (0, 0, 0, free)) for part in state[:2])
        self.positions = None if state.positions is None else F.pad(state.positions, (0, free))

    def __reduce__(self):
        return type(None), ()  # a copy of a state, in another process too, has no room

    def claim(self, before: AttentionState, now: AttentionState) -> bool:
        """Whether the slots of `now` may be written behind `before`, which nobody may from then on."""
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
        """As carry. Slots that are empty or outside the window stay among those with positions until the room is full."""
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
