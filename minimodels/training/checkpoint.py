"""What a training run stores, and how it continues from it.

    RUN/options.json               how the run was started, or last resumed
    RUN/checkpoints/step-N/        weights (model.*), optimizer state (optimizer.*), random state
                                   of each process (random.*), and the progress
    RUN/log.jsonl                  what was measured

The format does not depend on how many processes write a checkpoint or how they split the tensors
(see shards.py). A checkpoint contains no code, because it contains no pickle.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.data.tokenizer import TokenizerFile
from minimodels.errors import InputError
from minimodels.files import read_json, write_json
from minimodels.lm import LM
from minimodels.training import shards
from minimodels.training.shards import FOLDER, Found, exists, find

__all__ = [
    "FOLDER", "differing_fields", "exists", "find", "home", "load", "load_model", "persistent_tensors",
    "restore", "resume", "save", "save_model", "save_options", "saved_config",
]  # fmt: skip


def save(
    run: Path,
    model: LM,
    optimizer: torch.optim.Optimizer | None,
    progress: dict,
    score: float | None = None,
    keep: int = 2,
) -> None:
    """Write the whole state of a training run after step `progress["step"]`.

    progress: any JSON object with "step". score: of the model on held-out data; lower is better.
    keep: how many of the newest checkpoints to keep; the one with the best score is kept too.

    Collective: all processes of a run call it, with the same progress. Raises InputError if the
    checkpoint cannot be written; then the earlier ones do not change.
    """
    tensors = {f"model.{name}": tensor for name, tensor in persistent_tensors(model).items()}
    for name, parameter in model.named_parameters():
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors[f"random.cpu.{shards.number()}"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors[f"random.cuda.{shards.number()}"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    about = {"progress": progress, "score": score, "config": asdict(model.config)}
    shards.write(run, progress["step"], tensors, about, keep)


def resume(run: Path, model: LM, optimizer: torch.optim.Optimizer, data: str) -> dict:
    """Restore the newest undamaged checkpoint of a run, and return its progress. Prints which
    checkpoints were passed over, and why. Collective.

    data: the fingerprint of the data. Raises InputError if the run was trained on other data.
    """
    found = find(run)
    for damaged in found.passed_over:
        print(f"passed over a checkpoint: {damaged}")
    progress = found.about["progress"]
    if progress.get("data", data) != data:
        raise InputError("data", data, f"what {run} was started with: {progress['data']}")
    restore(found, model, optimizer)
    return progress


def load(run: Path, model: LM, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Restore the newest undamaged checkpoint of a run, and return its progress. `run` can also be
    the folder of one checkpoint."""
    found = find(run)
    restore(found, model, optimizer)
    return found.about["progress"]


def restore(found: Found, model: LM, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into the model and, with an optimizer, into its state and the random state.
    Collective.

    Raises InputError if the checkpoint is of another model; then nothing changes.
    """
    saved = shards.described(found.folder)
    check_model(found, saved, model)
    tensors = {f"model.{name}": tensor for name, tensor in persistent_tensors(model).items()}
    if optimizer is None:
        shards.read(found.folder, tensors)
        return
    moments = empty_moments(saved, model)
    random = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in saved.items()
        if name.startswith("random.")
    }
    shards.read(found.folder, tensors | moments | random)
    set_moments(model, optimizer, moments)
    mine = f".{shards.number()}"  # a new process keeps its own random state
    if f"random.cpu{mine}" in random:
        torch.set_rng_state(random[f"random.cpu{mine}"])
    if f"random.cuda{mine}" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[f"random.cuda{mine}"])


def check_model(found: Found, saved: dict[str, tuple[list[int], torch.dtype]], model: LM) -> None:
    """Raise InputError unless a checkpoint is of a model like this one."""
    changed = differing_fields(saved_config(found), model.config)
    if changed:
        accepted = f"a model of this configuration; it has {'; '.join(changed)}"
        raise InputError("checkpoint", str(found.folder), accepted)
    wanted = {
        f"model.{name}": (list(tensor.shape), tensor.dtype)
        for name, tensor in persistent_tensors(model).items()
    }
    stored = {name: each for name, each in saved.items() if name.startswith("model.")}
    wrong = sorted(
        f"{name.removeprefix('model.')} {text(stored.get(name))} for {text(wanted.get(name))}"
        for name in wanted.keys() | stored.keys()
        if stored.get(name) != wanted.get(name)
    )
    if wrong:
        accepted = f"the tensors of this model; differing: {', '.join(wrong)}"
        raise InputError("checkpoint", str(found.folder), accepted)


def saved_config(found: Found) -> Config:
    """The configuration of the model in a checkpoint. Fields that are newer than the checkpoint get
    their defaults."""
    try:
        return Config(**found.about["config"])
    except (KeyError, TypeError) as error:
        accepted = f"the checkpoint of a model ({error})"
        raise InputError("checkpoint", str(found.folder), accepted) from None


def empty_moments(
    saved: dict[str, tuple[list[int], torch.dtype]], model: nn.Module
) -> dict[str, Tensor]:
    """A tensor to fill for each entry of the saved optimizer state: a single number, or split among
    the processes like its parameter. Raises InputError if an entry has another shape."""
    moments = {}
    for parameter_name, parameter in model.named_parameters():
        prefix = f"optimizer.{parameter_name}."
        for name in saved:
            if name.startswith(prefix):
                size, dtype = saved[name]
                if size and size != list(parameter.shape):
                    wanted = text((list(parameter.shape), dtype))
                    raise InputError(
                        "checkpoint",
                        f"{name} {text(saved[name])}",
                        f"the shape of its parameter, {wanted}",
                    )
                moments[name] = (
                    torch.zeros_like(parameter.detach(), dtype=dtype)
                    if size
                    else torch.zeros((), dtype=dtype, device=parameter.device)
                )
    return moments


def set_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]
) -> None:
    """Give each parameter the optimizer state that was saved under its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [
        names[parameter] for group in optimizer.param_groups for parameter in group["params"]
    ]
    state = {
        index: {
            name.removeprefix(f"optimizer.{parameter}."): moment
            for name, moment in moments.items()
            if name.startswith(f"optimizer.{parameter}.")
        }
        for index, parameter in enumerate(ordered)
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def text(described: tuple[list[int], torch.dtype] | None) -> str:
    """The shape and type of a tensor, for an error message."""
    if described is None:
        return "missing"
    size, dtype = described
    return f"{size} {str(dtype).removeprefix('torch.')}"


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint stores, by name. Those of a
    shared layer appear once."""
    kept = model.state_dict().keys()
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in every if name in kept}


def differing_fields(given: Config, wanted: Config) -> list[str]:
    """The fields in which two models differ, as "field value, not wanted value".
    `impl` makes no difference."""
    changed = (
        [] if given.calls == wanted.calls else [f"layers {given.layers!r}, not {wanted.layers!r}"]
    )
    for field in fields(Config):
        before, after = getattr(given, field.name), getattr(wanted, field.name)
        if before != after and field.name not in ("layers", "impl"):
            changed.append(f"{field.name} {before!r}, not {after!r}")
    return changed


def save_options(run: Path, options: dict) -> None:
    """Write the options of a run, with which it can be resumed. Raises InputError if the
    folder cannot be written."""
    try:
        write_json(run / "options.json", {**options, "checksum": options_checksum(options)})
    except OSError as error:
        raise InputError(
            "out", str(run), f"a folder that can be written ({error.strerror})"
        ) from None


def read_saved_options(run: Path, field: str) -> dict:
    """The options of a run. Raises InputError, which names `field`, if there are none or if they
    have changed since they were saved."""
    path = run / "options.json"
    saved = read_json(path, field)
    if saved.pop("checksum", None) not in (None, options_checksum(saved)):
        accepted = "options as a run saved them; these were changed or damaged"
        raise InputError(field, str(path), accepted)
    return saved


def options_checksum(options: dict) -> int:
    """The CRC-32 of options as JSON."""
    return zlib.crc32(json.dumps(options, sort_keys=True).encode())


def save_model(model: LM, folder: str | Path) -> None:
    """Save a model that was trained in Python, so that load_model and
    minimodels.sample can read it. It replaces a model that save_model wrote there.

    Raises InputError if `model` is no LM, or if the folder contains anything else or cannot be
    written.
    """
    if not isinstance(model, LM):
        raise InputError("model", type(model).__name__, "an LM")
    folder = Path(folder)
    own = {"options.json", FOLDER}
    if folder.exists() and not (
        folder.is_dir() and own >= {path.name for path in folder.iterdir()}
    ):
        accepted = "a new or empty folder, or one that save_model has written"
        raise InputError("folder", str(folder), accepted)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("folder", str(folder), f"a folder that can be created ({error})") from None
    save_options(folder, {"config": asdict(model.config)})
    save(folder, model, None, {"step": 0})


def load_model(run: str | Path) -> LM:
    """The trained model of a run, or of one of its checkpoints (RUN/checkpoints/step-N), on the
    CPU, with its tokenizer. Raises InputError if there is none."""
    run = Path(run)
    if not run.is_dir():
        raise InputError("run", str(run), "the folder of a training run; there is no such folder")
    found = find(run)
    model = LM(saved_config(found))
    restore(found, model)
    options = read_saved_options(home(run), "run")
    if options.get("tokenizer", "bytes") != "bytes":
        model.tokenizer = TokenizerFile(home(run))
    return model


def home(folder: Path) -> Path:
    """The run to which a checkpoint's folder belongs; a run's own folder is returned as it is."""
    return folder.resolve().parents[1] if (folder / shards.PROGRESS).exists() else folder
