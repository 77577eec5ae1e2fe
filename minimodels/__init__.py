"""minimodels: compact implementations of the architectures beyond the transformer, to read, to train and to measure."""

from importlib.metadata import PackageNotFoundError, version

from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.generate import Sampling, complete, generate
from minimodels.ledger import ledger
from minimodels.lm import LM
from minimodels.presets import preset
from minimodels.published import from_pretrained, save_pretrained
from minimodels.training.checkpoint import load_model

try:
    __version__ = version("minimodels")
except PackageNotFoundError:
    __version__ = "unknown"

__all__ = [
    "LM",
    "Config",
    "InputError",
    "Sampling",
    "__version__",
    "complete",
    "from_pretrained",
    "generate",
    "ledger",
    "load_model",
    "preset",
    "save_pretrained",
]
