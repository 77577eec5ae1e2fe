"""What a config.json says, in the terms of this project, and back. The tables stand in minimodels/families.py.

Nothing is passed over: an entry that no table names is refused, and what is written is read again and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from minimodels.architectures.mamba import dt_rank
from minimodels.architectures.moe import expert_width
from minimodels.architectures.transformer import mlp_width
from minimodels.config import Config, layer_names, parse_layers
from minimodels.errors import InputError
from minimodels.grammar import parse_scaling
from minimodels.published.families import FAMILIES, IDLE, MEANINGS, ONLY, REQUIRED, Family
from minimodels.published.layouts import Entries, read_rope, write_rope

SPELLINGS = {
    "layers": parse_layers,
    "rope_scaling": parse_scaling,
}  # fields whose text can say the same in several ways
OBJECTIVE = {"balance", "balance_loss", "z_loss"}  # fields that concern training and not the model


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path.name, str(path), f"a file with a JSON object ({error})") from None
    if not isinstance(content, dict):
        raise InputError(path.name, str(path), "a file with a JSON object")
    return content


def family_of(entries: dict) -> Family:
    """The family that a config.json names."""
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError("config.json model_type", name, ", ".join(FAMILIES))
    return FAMILIES[name]


def read_config(
    entries: dict, family: Family, ignore: Iterable[str] = (), overrides: dict | None = None
) -> Config:
    """The Config that a config.json describes. Raises InputError on an entry that is missing, unknown or not implemented."""
    values = meaning(entries, family, ignore)
    known = {field.name for field in fields(Config)}
    for name in overrides or ():
        if name not in known:
            raise InputError("overrides", name, ", ".join(sorted(known)))
    try:
        return Config(**{**values, **(overrides or {})})
    except InputError as error:
        sources = [
            entry
            for entry, (targets, _) in family.entries.items()
            if error.field in targets.split()
        ]
        raise InputError(
            f"config.json {sources[0] if sources else error.field}", error.value, error.accepted
        ) from None


def meaning(entries: dict, family: Family, ignore: Iterable[str] = ()) -> dict[str, object]:
    """The fields of Config that a family speaks of, with what its config.json says of them."""
    entries = Entries(
        {
            family.aliases.get(name, name): value
            for name, value in entries.items()
            if name not in ignore
        }
    )
    for name, accepted in {**ONLY, **family.only}.items():
        if entries.get(name, accepted) != accepted:
            raise InputError(
                f"config.json {name}", entries.get(name), f"{accepted!r}, or no such entry"
            )
    values = dict(family.fixed)
    for name, (targets, absent) in family.entries.items():
        value = entries.get(name, absent)
        if value is REQUIRED or (
            name in entries and type(value) is int and value < 1
        ):  # 0 means something else in Config
            raise InputError(
                f"config.json {name}",
                entries.get(name),
                "1 or more" if name in entries else "a value",
            )
        meanings = MEANINGS.get(name, {})
        if name in entries and True in meanings and type(value) is not bool:
            raise InputError(f"config.json {name}", value, "true or false")
        if isinstance(value, (str, int)):
            value = meanings.get(value, value)
        values |= dict.fromkeys(targets.split(), value)
    if family.rope_base:
        values |= read_rope(entries, family.rope_base)
    if "experts" in values:  # as transformers balances them, and where it does
        balanced, weight = (
            entries.get("output_router_logits", False),
            entries.get("router_aux_loss_coef", 0.0),
        )
        values |= {"balance": "pooled", "balance_loss": weight if balanced else 0.0, "z_loss": 0.0}
    values |= family.layers(entries)
    unknown = {
        name: value
        for name, value in entries.items()
        if name not in {*entries.asked, *IDLE, *family.idle}
    }
    if unknown:
        raise InputError(
            "config.json",
            unknown,
            "entries known for this model_type, or named in `ignore` to be left out",
        )
    return values


def write_config(config: Config, origin: dict) -> tuple[str, dict]:
    """The first family that expresses a Config, that of `origin` before all others, and its config.json.

    origin: the config.json that the model was read from, {} if none. Raises InputError if no family expresses the Config.
    """
    differing = {}
    for name in sorted(FAMILIES, key=lambda name: name != origin.get("model_type")):
        try:
            return name, express(config, name, origin)
        except InputError as error:
            differing[name] = error.field
    differences = ", ".join(f"{name} differs in {field}" for name, field in differing.items())
    raise InputError("model", config.layers, f"what a published family expresses; {differences}")


def express(config: Config, name: str, origin: dict) -> dict:
    """The config.json of a family for a Config, beside what `origin` says. Raises InputError where it means another model."""
    family, config = FAMILIES[name], explicit(config)
    if origin.get("model_type") != name:
        origin = {
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }  # for the classes have defaults
    entries = {family.aliases.get(entry, entry): value for entry, value in origin.items()}
    entries |= {"model_type": name, "architectures": [family.architecture]}
    for entry, (targets, _) in family.entries.items():
        value = getattr(config, targets.split()[0])
        meanings = {ours: theirs for theirs, ours in MEANINGS.get(entry, {}).items()}
        if True in meanings.values() and value not in meanings:
            raise InputError(targets, value, ", ".join(meanings))
        entries[entry] = meanings.get(value, value)
    if family.rope_base:
        entries = {
            entry: value
            for entry, value in entries.items()
            if entry not in ("rope_theta", "rope_scaling")
        }
        entries |= write_rope(config.rope_base, config.rope_scaling)
    if (
        "moe" in layer_names(parse_layers(config.layers))
        and config.balance_loss
        and config.balance == "pooled"
    ):
        entries |= {"output_router_logits": True, "router_aux_loss_coef": config.balance_loss}
    entries |= family.outline(parse_layers(config.layers), config.window)

    spoken = meaning(entries, family)
    again = explicit(Config(**spoken))
    for field in spoken.keys() - OBJECTIVE:
        told, meant = getattr(again, field), getattr(config, field)
        if told != meant and (
            field not in SPELLINGS or SPELLINGS[field](told) != SPELLINGS[field](meant)
        ):
            raise InputError(field, meant, str(told))
    return entries


def explicit(config: Config) -> Config:
    """The same with every field spelled out that stood for something else at 0."""
    return replace(
        config,
        vocab=config.vocab or 256,
        kv_heads=config.kv_heads or config.heads,
        head_dim=config.head_dim or config.width // config.heads,
        mlp_width=mlp_width(config),
        expert_width=expert_width(config),
        dt_rank=dt_rank(config),
        mamba_norm_eps=config.mamba_norm_eps or config.norm_eps,
    )
