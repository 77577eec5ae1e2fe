"""Generate one token per row with a state whose tensors never move, so that a CUDA graph can do it.

A small model needs hundreds of short kernels for a token, and they take longer to launch than to
run. A CUDA graph records the launches of one step and repeats them at once. The graph reads and
writes the same addresses each time. So the state has room for the next tokens, positions are
tensors on the device, and each step writes its results into the state. Without a GPU the same step
runs without a graph.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.ops.cache import AttentionState, slotted

ROOM = 256  # free places in a state; a full one is copied to a larger one, with a new graph


class GrowingStep:
    """(B,) tokens -> logits (B, V) of the next ones, like FixedStep but with a growing state."""

    def __init__(self, model: LM, state: list):
        self.model, self.state = model, state

    def __call__(self, tokens: Tensor) -> Tensor:
        x, self.state = self.model.features(tokens[:, None], self.state)
        return self.model.logits(x[:, 0])


class FixedStep:
    """(B,) tokens -> logits (B, V) of the next ones. A call may overwrite the last call's logits.

    state: the model's state after B = `rows` prompts. Raises InputError if the host must wait for
    values in a layer's step.
    """

    def __init__(self, model: LM, state: list, rows: int):
        if reason := waits(model):
            raise InputError(
                "model", "with a state of fixed size", f"other layers, because {reason}"
            )
        self.model, self.rows, self.device = model, rows, model.device
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.begin(state)

    def begin(self, state: list) -> None:
        """Continue from a copy of the state with room for ROOM tokens."""
        self.state, self.left = fixed(state, self.rows, self.device), ROOM
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = has_graphs(self.device)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self.left == 0:
            self.begin(self.state)
        self.left -= 1
        self.tokens.copy_(tokens.unsqueeze(1))
        # the first call compiles and tunes the kernels, which a graph cannot record
        if self.records and self.logits is not None:
            self.record()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits

    def record(self) -> None:
        """Record a step without running it. If that fails, warn and continue without a graph."""
        self.records, graph = False, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.run()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph: {error}", stacklevel=2)
        else:
            self.graph = graph

    def run(self) -> None:
        """Compute the logits, and overwrite the state with the one after the tokens."""
        x, after = self.model.features(self.tokens, self.state)
        self.logits = self.model.logits(x[:, 0])
        for old, new in zip(tensors(self.state), tensors(after), strict=True):
            if old is not new:
                old.copy_(new)


def has_graphs(device: torch.device) -> bool:
    """Whether the device can record and repeat a step."""
    return device.type == "cuda"


def waits(model: LM) -> str:
    """Why the host must wait for values in a step of the model; empty if it need not."""
    return next(filter(None, (getattr(part, "waits", "") for part in model.modules())), "")


def fixed(state: object, rows: int, device: torch.device) -> object:
    """A copy of a state, with room for ROOM more tokens and with numbers as (B,) tensors."""
    if isinstance(state, AttentionState):
        return slotted(state, ROOM)
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, int):  # a position, which may also be (B,)
        return torch.full((rows,), state, device=device)
    if isinstance(state, list | tuple):
        parts = [fixed(part, rows, device) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def tensors(state: object) -> list[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors(part)]
    return []
