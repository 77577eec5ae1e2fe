"""The options of a training run, and its folder.

The defaults come from a preset and a size, or from the run that is resumed. The command line
overrides them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minimodels.architectures.registry import LAYERS, WRAPPERS
from minimodels.command import parse_options
from minimodels.config import Config
from minimodels.data.files import runs_near
from minimodels.errors import Count, InputError, NonNegative, Positive, Range, check_types
from minimodels.files import LOCK
from minimodels.grammar import set_options
from minimodels.presets import fitted, preset
from minimodels.training import checkpoint
from minimodels.training.initial import open_initial

Number = Annotated[int, Range(0, 2**63 - 1, "a whole number from 0, below 2^63")]


@dataclass(frozen=True)
class Options:
    """What to train, on what, for how long."""

    config: tyro.conf.OmitArgPrefixes[Config]
    model: str = "transformer"
    """preset of layers and width to start from; python -m minimodels.ledger lists the presets"""
    size: str = "tiny"
    """tiny, for a CPU, or small, for a GPU: 124M parameters as in GPT-2, or 85M with byte tokens. It
    also sets a few options of layers, such as heads, where the text of the layers does not"""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """LAYER.OPTION=VALUE, such as mamba.state_size=32, for all layers of that name; repeatable"""
    data: str = "stdlib"
    """stdlib (Python's own source), a file, a folder, a mixture ("code=0.7:DIR
    prose=0.3:FILE"), an id on the Hugging Face hub, or a task: copying, induction,
    mqar(pairs=8, vocab=256), overwrite, parity, s3"""

    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or bpe(vocab=8192): up to 8192 tokens, trained on the run's own text
    (at most 64 MiB of it)"""
    pack: bool = False
    """use rows of whole documents, which do not see each other, instead of windows cut at random"""
    field: str = "text"
    """the field to read from JSON lines and Parquet"""
    cache: str = ""
    """folder for tokens and unpacked text; by default ~/.cache/minimodels"""

    steps: Annotated[int, Range(1, 2**63 - 1, "a whole number from 1, below 2^63")] | None = None
    """bound: optimizer steps; 600 for tiny and 20,000 for small if no bound is given"""
    tokens: Positive | None = None
    """bound: training tokens"""
    flops: Positive | None = None
    """bound: training FLOPs, as counted by the ledger"""
    minutes: Positive | None = None
    """bound: wall-clock minutes of training, including evaluation"""

    context: Count = 256
    """tokens per sequence"""
    batch_size: Count | Literal["auto"] = 8
    """sequences per forward pass of all processes together; auto: as many as fit in memory, without
    changing the default number per step"""
    accumulate: Count = 1
    """forward passes per optimizer step"""
    ramp: str = ""
    """what changes during the run: context=256:2048@0.5 grows over the first half and then stays;
    batch_size and the weights in a mixture, by name, can change too"""
    lr: Positive = 2e-3
    """highest learning rate of AdamW"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine (to a tenth), wsd (stable, then to zero over the last fifth) or constant"""
    warmup: Number = 50
    """steps over which the learning rate rises"""
    weight_decay: NonNegative = 0.1
    """weight decay of matrices; norms, biases, A_log and D never decay"""
    clip: NonNegative = 1.0
    """largest norm of the gradient; 0: no limit"""
    seed: Number = 0
    """seed of the weights and of the order of the data"""

    device: str = "auto"
    """auto, cpu or cuda"""
    threads: Count | None = None
    """CPU threads; by default the fastest number in a short trial, which a resumed run keeps"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto (bfloat16 autocast on GPUs that have it), float32 or bfloat16"""
    compile: bool = False
    """torch.compile the training step, which needs a C++ compiler on a CPU"""
    checkpoint_activations: bool = False
    """recompute each block in the backward pass: a step takes a third longer but much less memory;
    not with --compile"""
    context_parallel: Count = 1
    """with torchrun: how many processes share each text, each with one piece of it"""
    shard: bool = False
    """with torchrun: each process stores a part of the weights and moments, not all of them"""

    skip_bad_steps: Number = 0
    """how many bad steps to skip before the run ends; a step is bad if its loss explodes, or if its
    loss or gradient is not finite"""
    eval_every: Number = 100
    """steps between validations, each followed by a checkpoint; 0: only at the end"""
    keep: Count = 2
    """how many of the newest checkpoints to keep; the one with the best validation is kept too"""
    eval_batches: Count = 8
    """batches per validation"""
    sample_every: Number = 0
    """steps between samples; 0: only at the end"""
    prompt: str = "import "
    """text that the samples continue"""
    log_every: Count = 10
    """steps between lines of log.jsonl"""
    out: Path | None = None
    """folder of the run, new or empty; by default runs/MODEL (runs/custom if its layers or settings
    are changed), or the next free name"""
    init: str = ""
    """weights to start from: the folder of a run, a checkpoint or a published model, or the id of a
    published model. Its layers and its tokenizer are used too"""
    resume: Path | None = None
    """folder of a run to continue. Its options stay, including its bounds (--steps None lifts one).
    Bounds, rates (lr, schedule, warmup, weight_decay, clip), batches (batch_size, accumulate, ramp),
    reporting and execution (such as device, dtype, compile, impl) may change"""

    def __post_init__(self):
        check_types(self)
        if not self.prompt:
            raise InputError("prompt", self.prompt, "at least one character")
        if self.compile and self.checkpoint_activations:
            accepted = (
                "False with checkpoint_activations, because a recomputed block does not record its "
                "losses again, so its graph would differ"
            )
            raise InputError("compile", True, accepted)


SYNONYMS = {  # what other programs call an option -> what to write here
    "learning_rate": "--lr", "batch": "--batch-size", "bs": "--batch-size", "micro_batch_size": "--batch-size",
    "epochs": "--steps", "max_steps": "--steps", "max_iters": "--steps", "iters": "--steps",
    "block_size": "--context", "seq_len": "--context", "sequence_length": "--context", "ctx": "--context",
    "d_model": "--width", "n_embd": "--width", "hidden_size": "--width", "dim": "--width",
    "grad_clip": "--clip", "wd": "--weight-decay", "output": "--out", "output_dir": "--out", "dataset": "--data",
    "gradient_accumulation_steps": "--accumulate", "grad_accum": "--accumulate",
    **{name: f"--set {layer}.{name}=VALUE" for layer, kind in reversed({**LAYERS, **WRAPPERS}.items())
       for name in kind.Options.__dataclass_fields__},
    "n_layer": "--layers", "n_layers": "--layers", "num_layers": "--layers", "n_head": "--set attention.heads=VALUE",
}  # fmt: skip
TRAINING = {  # size -> the options that differ from the defaults
    "tiny": {},
    "small": {"context": 1024, "batch_size": 32, "lr": 6e-4, "warmup": 500, "eval_every": 1000},
}
DEFAULT_ROWS = {size: given.get("batch_size", 8) for size, given in TRAINING.items()}
DEFAULT_STEPS = {"tiny": 600, "small": 20_000}  # if no bound is given
BOUNDS = ("steps", "tokens", "flops", "minutes")
# files of a run that saved no checkpoint
LEFT_BEHIND = {"options.json", "log.jsonl", "tokenizer.json", LOCK, checkpoint.FOLDER}
CHANGEABLE = {
    *BOUNDS, "lr", "schedule", "warmup", "weight_decay", "clip", "batch_size", "accumulate", "ramp",
    "skip_bad_steps", "data", "cache", "device", "threads", "dtype", "compile",
    "checkpoint_activations", "context_parallel", "shard", "eval_every", "eval_batches", "keep",
    "sample_every", "prompt", "log_every", "resume",
}  # fmt: skip


def parse(description: str) -> Options:
    """Read the command line. The defaults come from the preset that it names or the run that it
    resumes. `description` is the first part of its help."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--size", "--resume", "--init", "--layers"):
        first.add_argument(name, nargs="?")
    named, _ = first.parse_known_args()
    if named.resume is not None:
        return parse_resumed(Path(named.resume), description)
    if named.init is not None and named.model is not None:
        accepted = f"no --model with --init, because {named.init} has its own layers"
        raise InputError("model", named.model, accepted)
    if named.layers is not None and named.model is not None:
        accepted = "--model or --layers, not both"
        raise InputError("model", named.model, accepted)
    model, size = named.model or "transformer", named.size or "tiny"
    default = Options(preset(model, size), model, size, **TRAINING[size])
    if named.init is not None:
        initial, tokenizer = open_initial(named.init)
        default = replace(default, config=initial.config, tokenizer=tokenizer)
    options = parse_options(Options, description, default, SYNONYMS)
    if named.init is not None and options.tokenizer != default.tokenizer:
        accepted = f"no other tokenizer with --init, because {named.init} has its own"
        raise InputError("tokenizer", options.tokenizer, accepted)
    layers = options.config.layers
    if named.layers is not None:
        layers = fitted(layers, size)
    return replace(
        options, set=[], config=replace(options.config, layers=set_options(layers, options.set))
    )


def parse_resumed(run: Path, description: str) -> Options:
    """Read the command line over the options of a run. Raises InputError for a
    change that is not allowed."""
    saved = read_options(run)
    options = parse_options(Options, description, saved, SYNONYMS)
    layers = set_options(options.config.layers, options.set)
    options = replace(options, set=[], config=replace(options.config, layers=layers))
    accepted = f"what {run} was started with"
    for each in fields(Options):
        before, after = getattr(saved, each.name), getattr(options, each.name)
        if before != after and each.name not in {*CHANGEABLE, "config"}:
            if each.name == "out":
                raise InputError("out", str(after), "none, because a resumed run keeps its folder")
            given = str(after) if isinstance(after, Path) else after
            raise InputError(each.name, given, f"{before!r}, with which {run} was started")
    changed = checkpoint.differing_fields(options.config, saved.config)
    if changed:
        raise InputError("config", changed[0], accepted)
    return options


def read_options(run: Path) -> Options:
    """The options that a run was started with, or last resumed with."""
    if not run.is_dir():
        raise InputError(
            "resume", str(run), "the folder of a training run; there is no such folder"
        )
    if run.parent.name == checkpoint.FOLDER:
        accepted = f"the folder of the run, {run.parent.parent}; --init starts from a checkpoint"
        raise InputError("resume", str(run), accepted)
    if not (run / "options.json").exists():
        accepted = f"{runs_near(run)}a training run's folder, with options.json and checkpoints"
        raise InputError("resume", str(run), accepted)
    saved = checkpoint.read_saved_options(run, "resume")
    try:
        return Options(**{**saved, "config": Config(**saved["config"]), "out": None, "resume": run})
    except (KeyError, TypeError) as error:
        raise InputError("resume", str(run), f"the folder of a training run ({error})") from None


def changes(options: Options) -> list[str]:
    """What differs from the run that is resumed: "lr: 0.002 -> 0.001"."""
    if options.resume is None:
        return []
    saved = read_options(options.resume)
    pairs = {each.name: (getattr(saved, each.name), getattr(options, each.name))
             for each in fields(Options) if each.name not in ("config", "out", "resume")}  # fmt: skip
    pairs["impl"] = (saved.config.impl, options.config.impl)
    return [
        f"{name}: {before} -> {after}" for name, (before, after) in pairs.items() if before != after
    ]


def label(options: Options) -> str:
    """The name of a run: its preset, or "custom" if its layers differ."""
    same = options.config.calls == preset(options.model, options.size).calls
    return options.model if same else "custom"


def new_folder(options: Options) -> Path:
    """Make the folder of a new run: the one named, if nothing in it can be lost,
    or the first free name."""
    named = options.out or Path("runs") / label(options)
    try:
        named.parent.mkdir(parents=True, exist_ok=True)
        if options.out is None:
            return make_first(named)
        named.mkdir(exist_ok=True)
        refuse_used(named)
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL
        accepted = f"a folder that can be created ({error.args[-1]})"
        raise InputError("out", str(named), accepted) from None
    return named


def refuse_used(folder: Path) -> None:
    """Raise InputError if something in a folder for a new run can be lost."""
    if not folder.is_dir():
        return
    if checkpoint.exists(folder):
        again = f"--resume {shlex.quote(str(folder))} continues the run in it"
        raise InputError("out", str(folder), f"a new or empty folder; {again}")
    if {path.name.removesuffix(".partial") for path in folder.iterdir()} - LEFT_BEHIND:
        raise InputError("out", str(folder), "a new or empty folder")


def make_first(named: Path) -> Path:
    """Make a folder with this name, or with -2, -3 and so on. Runs that
    start together get one each."""
    for number in itertools.count(1):
        folder = named if number == 1 else named.with_name(f"{named.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
