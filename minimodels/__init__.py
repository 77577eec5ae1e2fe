"""minimodels: compact implementations of the architectures beyond the transformer, to read, to train and to measure."""

from .config import Config, InputError, preset
from .lm import LM

__all__ = ["LM", "Config", "InputError", "preset"]
