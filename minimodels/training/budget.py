"""What a run may spend, what it has spent, and the shape of its next batch.

Steps, tokens, FLOPs and minutes can bound a run, which ends at the first bound that it reaches.
With `--ramp` the context, the batch size and the weights of a mixture change with the progress
towards that bound, so the cost of a step changes too. The budget counts what each step really cost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from minimodels.config import Config
from minimodels.data.mixture import Mixture
from minimodels.data.schedule import WHOLE, ramp
from minimodels.data.source import Source
from minimodels.errors import InputError
from minimodels.ledger import ledger
from minimodels.training.options import BOUNDS, DEFAULT_STEPS, Options


class Shape(NamedTuple):
    """The batches of one step."""

    context: int  # tokens per row
    batch_size: int  # rows per forward pass
    tokens: int  # of all forward passes
    batches: range  # their numbers in the run, one for each forward pass
    weights: dict[str, float]  # of the parts of a mixture that have a ramp


class Budget:
    """The bounds of a run, and what it has spent: `step`, `batches`, `tokens` and `flops`. The
    caller keeps the time, and passes the seconds so far.

    `done`: what the resumed run had spent. Raises InputError if a bound is below that, or does not
    allow a single step.
    """

    def __init__(self, options: Options, config: Config, data: Source, done: dict):
        self.options, self.data = options, data
        bounds = {name: getattr(options, name) for name in BOUNDS}
        self.bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        self.bounds = self.bounds or {"steps": DEFAULT_STEPS[options.size]}
        self.step, self.batches, self.tokens, self.flops = (
            done.get(name, 0) for name in ("step", "batches", "tokens", "flops")
        )
        self.names = (*WHOLE, *(data.parts if isinstance(data, Mixture) else ()))
        self.flops_per_token = functools.cache(
            lambda context: ledger(config, context).training_flops
        )
        self.first, self.last = self.shape(0.0), self.shape(1.0)
        self.largest = max(self.first, self.last, key=lambda shape: shape.tokens)
        if options.ramp:
            for shape in (self.first, self.last):  # raises InputError if the text is too short
                next(self.draw(shape._replace(batch_size=1)))
        for name, spent in self.spent(0.0).items():
            if spent > self.bounds.get(name, spent):
                accepted = f"{spent} or more, because the run has spent that"
                raise InputError(name, self.bounds[name], accepted)
        if self.step == 0 and (name := self.exceeded(self.first, 0.0)):
            accepted = f"enough for one step of {self.first.tokens} tokens"
            raise InputError(name, self.bounds[name], accepted)

    def spent(self, seconds: float) -> dict[str, float]:
        """What was spent, by the name of the bound."""
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "flops": self.flops,
            "minutes": seconds / 60,
        }

    def record(self, seconds: float) -> dict[str, float]:
        """What was spent, for the log and for a checkpoint."""
        return {
            "step": self.step,
            "seconds": seconds,
            "batches": self.batches,
            "tokens": self.tokens,
            "flops": self.flops,
        }

    def progress(self, seconds: float) -> float:
        """The spent fraction of the nearest bound, from 0 to 1."""
        spent = self.spent(seconds)
        return min(1.0, max(spent[name] / bound for name, bound in self.bounds.items()))

    def shape(self, progress: float) -> Shape:
        """The batches of the next step at this progress."""
        options = self.options
        weights = ramp(options.ramp, progress, self.names)
        context = weights.pop("context", options.context)
        batch_size = weights.pop("batch_size", options.batch_size)
        batches = range(self.batches, self.batches + options.accumulate)
        tokens = context * batch_size * options.accumulate
        return Shape(context, batch_size, tokens, batches, weights)

    def draw(self, shape: Shape) -> Iterator[tuple]:
        """The batches of a step, one for each forward pass.

        Their numbers continue from the run's last batch, so a change of `accumulate` repeats none.
        """
        changed = {"weights": shape.weights} if shape.weights else {}
        for number in shape.batches:
            yield self.data.batch(
                self.options.seed, number, shape.batch_size, shape.context, **changed
            )

    def exceeded(self, shape: Shape, seconds: float) -> str | None:
        """The bound that a step of this shape would exceed; None if it fits into all."""
        cost = {"steps": 1, "tokens": shape.tokens, "flops": self.cost(shape)}
        after = {name: spent + cost.get(name, 0) for name, spent in self.spent(seconds).items()}
        if after["minutes"] >= self.bounds.get("minutes", float("inf")):
            return "minutes"
        return next((name for name, bound in self.bounds.items() if after[name] > bound), None)

    def reached(self, seconds: float) -> str:
        """The bound that the next step exceeds, as an option; "" if there is none."""
        name = self.exceeded(self.shape(self.progress(seconds)), seconds)
        return f"--{name} {self.bounds[name]:g}" if name else ""

    def ended(self, seconds: float) -> bool:
        """Whether the next step exceeds a bound."""
        return self.exceeded(self.shape(self.progress(seconds)), seconds) is not None

    def cost(self, shape: Shape) -> float:
        """The FLOPs of a step of this shape."""
        return shape.tokens * self.flops_per_token(shape.context)

    def spend(self, shape: Shape) -> None:
        """Count a step of this shape."""
        self.step += 1
        self.batches += len(shape.batches)
        self.tokens += shape.tokens
        self.flops += self.cost(shape)

    def describe_steps(self) -> str:
        """The size of the steps, for the header of a run."""
        first, last = self.first.tokens, self.last.tokens
        return f"{first} tokens a step" if first == last else f"{first} to {last} tokens a step"

    def describe(self) -> str:
        """The bounds, for the header of a run."""
        return " or ".join(f"{bound:g} {name}" if isinstance(bound, float) else f"{bound} {name}"
                           for name, bound in self.bounds.items())  # fmt: skip
