"""minimodels: compact implementations of the architectures beyond the transformer, to read, to train and to measure."""

from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.presets import preset

__all__ = ["LM", "Config", "InputError", "from_pretrained", "preset", "save_pretrained"]


def __getattr__(name: str):
    """Import what reads published models when it is asked for: it is a command too, and would otherwise be loaded twice."""
    if name in ("from_pretrained", "save_pretrained"):
        from minimodels.published import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module 'minimodels' has no attribute {name!r}")
