"""minimodels: compact implementations of the architectures beyond the transformer, to read, to train and to measure."""

from .config import Config, InputError, preset
from .lm import LM
from .pretrained import from_pretrained, save_pretrained

__all__ = ["LM", "Config", "InputError", "from_pretrained", "preset", "save_pretrained"]
