"""minimodels: compact implementations of the architectures beyond the transformer, to read, to
train and to measure."""

from minimodels import interrupts  # noqa: F401 (first, because the other imports take seconds)

# isort: split
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# kernels/ is the package minimodels.kernels. In a checkout that is not installed, it is beside this
# folder.
if (Path(__file__).parents[1] / "kernels" / "__init__.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.generate import Sampling, complete, generate
from minimodels.ledger import ledger
from minimodels.lm import LM
from minimodels.presets import preset
from minimodels.published import from_pretrained, save_pretrained
from minimodels.training.checkpoint import load_model, save_model

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
    "save_model",
    "save_pretrained",
]
