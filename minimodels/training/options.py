"""What a training run is asked to do: its options, refused where they cannot be meant, and its folder.

The defaults are those of a preset and a size, or the options of the run that is resumed; the command line stands over them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from minimodels.config import Config
from minimodels.errors import LARGEST, InputError, check_types
from minimodels.presets import preset
from minimodels.training.checkpoint import FILE as CHECKPOINT
from minimodels.training.optim import SCHEDULES


@dataclass(frozen=True)
class Options:
    """What to train, on what, for how long. Any field of the model's configuration is an option too."""

    config: tyro.conf.OmitArgPrefixes[Config]
    model: str = "transformer"
    """preset that the layers and widths start from: transformer, mamba, moe, mod or hybrid"""
    size: str = "tiny"
    """tiny, for a CPU; small, for a GPU: the shape of GPT-2's 124M, of which 85M are left with bytes for a vocabulary"""
    data: str = "stdlib"
    """stdlib (Python's own source), a file, a folder, or a task: copying, induction, mqar (mqar:pairs=8,vocab=256)"""

    steps: int | None = None
    """bound: optimizer steps; 600 for tiny and 20,000 for small where no bound is given"""
    tokens: float | None = None
    """bound: training tokens"""
    flops: float | None = None
    """bound: training FLOPs, as the ledger counts them"""
    minutes: float | None = None
    """bound: wall-clock minutes of training, evaluation included"""

    context: int = 256
    """tokens per sequence"""
    batch_size: int = 8
    """sequences per forward pass"""
    accumulate: int = 1
    """forward passes per optimizer step"""
    lr: float = 2e-3
    """peak learning rate of AdamW"""
    schedule: str = "cosine"
    """cosine (to a tenth), wsd (stable, then to zero over the last fifth) or constant"""
    warmup: int = 50
    """steps over which the learning rate rises"""
    weight_decay: float = 0.1
    """of matrices; norms, biases, A_log and D never decay"""
    clip: float = 1.0
    """largest norm of the gradient; 0: any"""
    seed: int = 0
    """of the weights and of the order of the data"""

    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (bfloat16 autocast on GPUs that have it), float32 or bfloat16"""
    compile: bool = False
    """torch.compile the training step, for which a CPU needs a C++ compiler"""

    eval_every: int = 100
    """steps between validations, each followed by a checkpoint; 0: only at the end"""
    eval_batches: int = 8
    """batches of a validation"""
    sample_every: int = 0
    """steps between samples; 0: only at the end"""
    prompt: str = "import "
    """what the samples continue"""
    log_every: int = 10
    """steps between lines of log.jsonl"""
    out: Path | None = None
    """folder of the run, new or empty; by default runs/MODEL (runs/custom with other layers), or the next free name"""
    resume: Path | None = None
    """folder of a run to go on with; its options hold, given bounds too (--steps None lifts one), and only bounds, reporting
    and how it is computed (device, dtype, compile, impl) may be changed"""

    def __post_init__(self):
        """Refuse what cannot be meant before anything is read or written."""
        check_types(self)
        for name in (*BOUNDS, "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(name, value, "a number above 0")
        for name in ("context", "batch_size", "accumulate", "eval_batches", "log_every"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise InputError(name, getattr(self, name), f"1 to {LARGEST}")
        for name in ("warmup", "weight_decay", "clip", "eval_every", "sample_every", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InputError(name, getattr(self, name), "0 or more, below 2^63")
        if self.schedule not in SCHEDULES:
            raise InputError("schedule", self.schedule, ", ".join(SCHEDULES))
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError("dtype", self.dtype, "auto, float32 or bfloat16")
        if not self.prompt:
            raise InputError("prompt", self.prompt, "at least one character")


TRAINING = {  # size -> the options that differ from the defaults
    "tiny": {},
    "small": {"context": 1024, "batch_size": 32, "lr": 6e-4, "warmup": 500, "eval_every": 1000},
}
DEFAULT_STEPS = {"tiny": 600, "small": 20_000}  # where no bound is given
BOUNDS = ("steps", "tokens", "flops", "minutes")
CHANGEABLE = {*BOUNDS, "impl", "device", "dtype", "compile", "eval_every", "eval_batches", "sample_every", "prompt",
              "log_every", "resume"}  # fmt: skip


def parse(description: str) -> Options:
    """The command line, over the defaults of the preset that it names or the options of the run that it resumes. `description`
    heads its help."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--size", "--resume"):
        first.add_argument(name, nargs="?")
    named, _ = first.parse_known_args()
    if named.resume is None:
        model = "transformer" if named.model is None else named.model
        size = "tiny" if named.size is None else named.size
        return tyro.cli(
            Options,
            default=Options(preset(model, size), model, size, **TRAINING[size]),
            description=description,
        )

    saved = read_options(Path(named.resume))
    options = tyro.cli(Options, default=saved, description=description)
    before, after = ({**asdict(each), **asdict(each.config)} for each in (saved, options))
    for name in before.keys() - CHANGEABLE - {"config"}:
        if before[name] != after[name]:
            raise InputError(
                name, after[name], f"{before[name]!r}, with which {saved.resume} was started"
            )
    return options


def read_options(run: Path) -> Options:
    """The options that a run was started with, or last resumed with."""
    try:
        saved = json.loads((run / "options.json").read_text())
        return Options(**{**saved, "config": Config(**saved["config"]), "out": None, "resume": run})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("resume", str(run), f"the folder of a training run ({error})") from None


def count_steps(options: Options, tokens_per_step: int, flops_per_token: float) -> float:
    """The step that the first of the bounds on steps, tokens and FLOPs allows; infinite where only minutes bound."""
    bounds = [
        math.inf if options.steps is None else options.steps,
        math.inf if options.tokens is None else options.tokens // tokens_per_step,
        math.inf if options.flops is None else options.flops // (tokens_per_step * flops_per_token),
    ]
    if min(bounds) < 1:
        raise InputError(
            "tokens, flops",
            (options.tokens, options.flops),
            f"enough for one step of {tokens_per_step} tokens",
        )
    if min(bounds) == math.inf:
        return DEFAULT_STEPS[options.size] if options.minutes is None else math.inf
    return int(min(bounds))


def label(options: Options) -> str:
    """What a run is called: its preset, or "custom" if it has other layers."""
    return (
        options.model
        if options.config.layers == preset(options.model, options.size).layers
        else "custom"
    )


def new_folder(options: Options) -> Path:
    """The folder of a new run, made: the one named, if it is new or empty, or the first free name."""
    named = options.out or Path("runs") / label(options)
    try:
        named.parent.mkdir(parents=True, exist_ok=True)
        if options.out is None:
            return make_first(named)
        named.mkdir(exist_ok=True)
        if any(named.iterdir()):
            more = (
                f"; to go on with the run in it: --resume {shlex.quote(str(named))}"
                * (named / CHECKPOINT).exists()
            )
            raise InputError("out", str(named), f"a new or empty folder{more}")
    except OSError as error:
        raise InputError(
            "out", str(named), f"a folder that can be made ({error.strerror})"
        ) from None
    return named


def make_first(named: Path) -> Path:
    """Make a folder of this name, or with -2, -3 and so on: runs that start at once each make their own."""
    for number in itertools.count(1):
        folder = named if number == 1 else named.with_name(f"{named.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
