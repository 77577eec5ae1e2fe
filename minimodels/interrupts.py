"""Let Ctrl-C end a command of this repository at once and without a traceback during its imports,
which take seconds because of PyTorch.

Importing this module is enough. Other programs that import minimodels are not affected.
"""

import os
import signal
import sys

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")


def is_command() -> bool:
    """Whether the program is train.py, or `python -m` with a module of this repository."""
    if sys.argv[:1] == ["-m"]:  # Python imports the package of the module that it will run
        given = " ".join(sys.orig_argv)
        return any(f" -m {package}" in given for package in ("minimodels", "benchmarks"))
    return os.path.abspath("".join(sys.argv[:1])) == TRAIN


if is_command():  # until run_command restores Python's own handler
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
