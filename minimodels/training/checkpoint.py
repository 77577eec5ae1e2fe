"""A run on disk: one safetensors file, which is either complete or absent, and readable JSON.

    RUN/options.json             how the run was started, or last resumed
    RUN/checkpoint.safetensors   weights (model.*), optimizer state (optimizer.*), random state;
                                 progress as JSON in the header
    RUN/log.jsonl                what was measured

A checkpoint is written under another name and then replaces the last one. It contains no code,
because no pickle is read.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.data.tokenizer import TokenizerFile
from minimodels.errors import InputError
from minimodels.files import atomic_write, read_json, write_json
from minimodels.lm import LM

FILE = "checkpoint.safetensors"
PARTS = ("model.", "optimizer.", "random.")


def save(run: Path, model: LM, optimizer: torch.optim.Optimizer | None, progress: dict) -> None:
    """Write the whole state of a training run. `progress` is any JSON object. Raises InputError
    if it cannot be written."""
    tensors = {f"model.{name}": tensor for name, tensor in persistent_tensors(model).items()}
    for name, parameter in model.named_parameters():
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {part: checksum(tensors, part) for part in PARTS}
    header = {"progress": json.dumps(progress), "config": json.dumps(asdict(model.config))}
    header["checksums"] = json.dumps({**checksums, "header": header_checksum(header)})
    try:
        with atomic_write(run / FILE) as path:
            save_file(tensors, path, header)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "out", str(run), f"a folder with room for a checkpoint ({error})"
        ) from None


class Saved(NamedTuple):
    """What a checkpoint holds."""

    progress: dict
    config: Config
    tensors: dict[str, Tensor]  # model.*, optimizer.* and random.*


BROKEN = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, InputError)


def load(run: Path, model: LM, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read a checkpoint into the model, and into the optimizer and random state if an optimizer is given.

    Returns the `progress` that was saved. Raises InputError if the file is missing, damaged, or of
    another model; then nothing is changed.
    """
    path = run / FILE
    saved = read(path, PARTS if optimizer is not None else PARTS[:1])
    check_model(path, saved, model)
    with torch.no_grad():
        for name, tensor in persistent_tensors(model).items():
            tensor.copy_(saved.tensors[f"model.{name}"])
    if optimizer is not None:
        restore_optimizer(model, optimizer, saved.tensors)
        restore_random(saved.tensors)
    return saved.progress


def read(path: Path, parts: tuple[str, ...]) -> Saved:
    """The parts of a checkpoint. Raises InputError if the file is missing or damaged."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            progress, config, checksums = (
                json.loads(header[key]) for key in ("progress", "config", "checksums")
            )
            config = Config(**config)  # a field that is newer than the file gets its default
            float(progress["step"])
            names = [name for name in file.keys() if name.startswith(parts)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
            known = {"header": header_checksum(header), **checksums}
    except BROKEN as error:
        accepted = f"a whole safetensors file of a training run ({error})"
        raise InputError("checkpoint", str(path), accepted) from None
    found = {"header": header_checksum(header), **{part: checksum(tensors, part) for part in parts}}
    if any(known.get(part) != value for part, value in found.items()):
        accepted = "a file whose checksum is that of its contents; this one is damaged"
        raise InputError("checkpoint", str(path), accepted)
    return Saved(progress, config, tensors)


def check_model(path: Path, saved: Saved, model: LM) -> None:
    """Raise InputError unless a checkpoint is of a model like this one."""
    changed = differing_fields(saved.config, model.config)
    if changed:
        accepted = f"a model of this configuration; differing: {', '.join(changed)}"
        raise InputError("checkpoint", str(path), accepted)
    wanted = {f"model.{name}": tensor for name, tensor in persistent_tensors(model).items()}
    found = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("model.")}
    wrong = sorted(
        f"{name.removeprefix('model.')} {shape(found.get(name))} for {shape(wanted.get(name))}"
        for name in wanted.keys() | found.keys()
        if shape(found.get(name)) != shape(wanted.get(name))
    )
    if wrong:
        accepted = f"the tensors of this model; differing: {', '.join(wrong)}"
        raise InputError("checkpoint", str(path), accepted)


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Set the random state to the saved one."""
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint stores, by name. Those of a
    shared layer appear once."""
    kept = model.state_dict().keys()
    every = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in every if name in kept}


def differing_fields(given: Config, wanted: Config) -> list[str]:
    """The fields in which two models differ, as "field value for wanted value".
    `impl` makes no difference."""
    changed = (
        [] if given.calls == wanted.calls else [f"layers {given.layers!r} for {wanted.layers!r}"]
    )
    for field in fields(Config):
        before, after = getattr(given, field.name), getattr(wanted, field.name)
        if before != after and field.name not in ("layers", "impl"):
            changed.append(f"{field.name} {before!r} for {after!r}")
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
    """The options of a run. Raises InputError, which names `field`, if there are none, or if they
    were changed since they were saved."""
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
    minimodels.sample can read it. A model that save_model has written there is replaced.

    Raises InputError if the folder holds anything else, or cannot be written.
    """
    folder = Path(folder)
    own = {"options.json", FILE}
    if folder.exists() and not (
        folder.is_dir() and own >= {path.name for path in folder.iterdir()}
    ):
        accepted = "a new or empty folder, or one that save_model has written"
        raise InputError("folder", str(folder), accepted)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("folder", str(folder), f"a folder that can be made ({error})") from None
    save_options(folder, {"config": asdict(model.config)})
    save(folder, model, None, {"step": 0})


def load_model(run: str | Path) -> LM:
    """The trained model of a run, on the CPU, with its tokenizer. Raises
    InputError if there is none."""
    run = Path(run)
    if not run.is_dir():
        raise InputError("run", str(run), "the folder of a training run; there is no such folder")
    options = read_saved_options(run, "run")
    try:
        model = LM(Config(**options["config"]))
    except (KeyError, TypeError) as error:
        raise InputError("run", str(run), f"the folder of a training run ({error})") from None
    load(run, model)
    if options.get("tokenizer", "bytes") != "bytes":
        model.tokenizer = TokenizerFile(run)
    return model


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Give each parameter the optimizer moments that were saved under its name."""
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [
        names[parameter] for group in optimizer.param_groups for parameter in group["params"]
    ]
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(ordered):
        prefix = f"optimizer.{name}."
        state[index] = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        for key, value in state[index].items():
            if value.ndim and value.shape != parameters[name].shape:
                given, accepted = (
                    f"{prefix}{key} {shape(value)}",
                    f"the shape of its parameter, {shape(parameters[name])}",
                )
                raise InputError("checkpoint", given, accepted)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def shape(tensor: Tensor | None) -> str:
    """A tensor's description in an error."""
    return (
        "missing"
        if tensor is None
        else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    )


def checksum(tensors: dict[str, Tensor], part: str) -> int:
    """The CRC-32 of the tensors whose names start with `part`: of their names and bytes."""
    value = 0
    for name in sorted(name for name in tensors if name.startswith(part)):
        value = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value)
        )
    return value


def header_checksum(header: dict[str, str]) -> int:
    """The CRC-32 of the progress and configuration in the header."""
    return zlib.crc32((header["progress"] + header["config"]).encode())
