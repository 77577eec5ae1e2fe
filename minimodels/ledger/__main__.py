"""Print what models cost, one line for each: parameters, FLOPs of a trained token, bytes of state.

    python -m minimodels.ledger                                          every preset
    python -m minimodels.ledger --layers "mamba mlp attention(window=64) mlp" --context 8192

The last column, unrouted/routed, is how many times the compute of its forward pass a model would
need if every token took every expert and every wrapped layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimodels.command import parse_options, run_command
from minimodels.errors import Count, InputError, Natural, check_types
from minimodels.ledger import ledger
from minimodels.presets import PRESETS, fitted, preset


@dataclass(frozen=True)
class Options:
    """Print what models cost."""

    model: str = ""
    """preset to count; by default every preset"""
    layers: str = ""
    """layers to count instead, with the width of `size` and its options, such as heads"""
    size: str = "tiny"
    """tiny or small"""
    context: Count = 1024
    """context in tokens at which FLOPs and state are counted"""
    vocab: Natural = 0
    """size of the vocabulary; 0: 256 bytes"""

    def __post_init__(self):
        check_types(self)
        if self.model and self.layers:
            raise InputError(
                "layers", self.layers, f"model or layers; the model {self.model} is given"
            )


def main(options: Options) -> None:
    """Print one line for each model."""
    models = [options.model] if options.model else PRESETS
    configs = {model: preset(model, options.size, vocab=options.vocab) for model in models}
    if options.layers:
        text = fitted(options.layers, options.size)
        configs = {
            options.layers: preset("transformer", options.size, layers=text, vocab=options.vocab)
        }
    costs = {name: ledger(config, options.context) for name, config in configs.items()}
    width = max(map(len, configs))
    print(f"{'':{width}}  parameters   active  MFLOPs/trained token  state KiB  unrouted/routed")
    for name, cost in costs.items():
        sizes = f"{cost.parameters / 1e6:9.2f}M {cost.active / 1e6:7.2f}M"
        flops = f"{cost.training_flops / 1e6:20.1f}"
        print(
            f"{name:{width}}  {sizes}  {flops}  {cost.state_bytes / 1024:9,.0f}  {cost.speedup:14.2f}x"
        )


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
