"""Translate a config.json to a Config and back, by the table of a family.

Nothing is ignored silently. An entry is refused if neither the table nor the rule for idle entries
knows it, and what is written is read again and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch

from minimodels.architectures.registry import build, read_call
from minimodels.config import Config
from minimodels.errors import InputError, nearest
from minimodels.files import read_json
from minimodels.grammar import MOST_LAYERS, Call, Option, set_options
from minimodels.published.entries import Entries
from minimodels.published.families import FAMILIES, HINTS
from minimodels.published.family import Family, Role, Setting, entry_of
from minimodels.published.text import call_of, write_layers
from minimodels.residual import Joint

__all__ = ["family_of", "read_config", "read_json", "write_config"]

NEUTRAL = {  # entries of any family -> the value at which they change nothing
    "hidden_act": "silu", "attention_dropout": 0.0, "auto_map": None, "rope_interleaved": False,
    "partial_rotary_factor": 1.0, "is_encoder_decoder": False, "add_cross_attention": False, "is_decoder": False,
}  # fmt: skip

IDLE = re.compile(  # entries that do not influence what a model computes, grouped by subject
    r"_.*|.*_version|unsloth_.*|transformers\..*|architectures|model_type|is_llama_config|task_specific_params"  # who wrote it
    r"|(torch_)?dtype|use_cache|return_dict.*|torchscript|pretraining_tp|use_bfloat16"  # how it is run
    r"|output_(attentions|hidden_states|router_logits|scores|past)"
    r"|(.*_)?tokens?_ids?|tokenizer_class|prefix|max_position_embeddings"  # the text
    r"|initializer_.*|router_aux_loss_coef|problem_type|(.*_)?loss_type|finetuning_task"  # training
    r"|id2label|label2id|num_labels|pruned_heads|chunk_size_feed_forward|tie_encoder_decoder|cross_attention_hidden_size"
    r"|(max|min)_(new_tokens|length)|do_sample|temperature|top_[kp]|typical_p|.*_penalty|num_beam.*|num_return_sequences"
    r"|early_stopping|(.*_)?no_repeat_ngram_size|bad_words_ids|remove_invalid_values|suppress_tokens|begin_suppress_tokens|tf_legacy_loss"
)


def is_idle(name: str, value: object) -> bool:
    """Whether an entry changes nothing in any model."""
    if re.fullmatch(r".*(dropout|_drop|_pdrop)(_.*)?", name):
        return value in (0, None)
    if name == "layer_types":  # in a class that has only one type
        return type(value) is list and all(each == "full_attention" for each in value)
    return IDLE.fullmatch(name) is not None


def is_packed(quantised: object) -> bool:
    """Whether experts are stored in MXFP4, which can be unpacked."""
    return isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"


def family_of(entries: dict) -> Family:
    """The family of a config.json. Raises InputError if it is unknown."""
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        hints = [hint for hint in map(lambda hint: hint(entries), HINTS) if hint]
        raise InputError("config.json model_type", name, (hints or [", ".join(FAMILIES)])[0])
    return FAMILIES[name]


# Reading.


def read_config(
    entries: dict,
    family: Family,
    ignore: Iterable[str] = (),
    settings: Iterable[str] = (),
    overrides: dict | None = None,
) -> Config:
    """The Config that a config.json describes.

    `settings` change options of layers, `overrides` change fields of Config.
    Raises InputError, which names the entry, if an entry is missing, unknown or not implemented.
    """
    known = {field.name for field in fields(Config)}
    for name in overrides or ():
        if name not in known:
            raise InputError("overrides", name, nearest(name, sorted(known)))
    given = Entries(
        {
            family.aliases.get(name, name): value
            for name, value in entries.items()
            if name not in ignore
        }
    )
    for name, accepted in family.only.items():
        require(given, name, accepted)
    for check in family.checks:
        check(given)
    shared = read_fields(given, family)
    text = read_layers(given, family, shared)
    if not is_packed(given.get("quantization_config")):
        require(given, "quantization_config", None)
    for name, accepted in NEUTRAL.items():
        if name not in given.asked:
            require(given, name, accepted)
    settings_of_roles = [each for role in family.roles.values() for each in role.settings]
    # entries that some model of the family uses
    spoken = {name for setting in settings_of_roles for name in setting.names}
    unknown = {
        name: value
        for name, value in given.items()
        if name not in {*given.asked, *spoken, *family.idle}
        if not is_idle(name, value)
        if name != "head_dim" or value != usual_head(given, shared.width)
    }
    if unknown:
        accepted = "entries known for this model_type, or named in `ignore` to be left out"
        raise InputError("config.json", unknown, accepted)
    text = set_options(text, tuple(settings))
    return replace(shared, **{"layers": text, **(overrides or {})})


def usual_head(entries: Entries, width: int) -> int | None:
    """The width of a head if there is no entry head_dim; None if there are no heads."""
    heads = dict.get(entries, "num_attention_heads")  # does not mark the entry as asked
    return width // heads if type(heads) is int and heads > 0 else None


def require(entries: Entries, name: str, accepted: object) -> None:
    """Raise InputError if an entry has a value other than the implemented one."""
    value = entries.get(name, accepted)
    if value != accepted:
        raise InputError(f"config.json {name}", value, f"{accepted!r}, or no such entry")


def read_fields(entries: Entries, family: Family) -> Config:
    """A Config with the fields of the whole model; its layers are still placeholders."""
    values = read_settings(entries, family.fields)
    try:
        return Config(**values)
    except InputError as error:
        name = entry_of(family.fields, error.field)
        raise InputError(f"config.json {name}", error.value, error.accepted) from None


def read_layers(entries: Entries, family: Family, shared: Config) -> str:
    """The text of the layers that a config.json describes."""
    count = entries.number(family.count, most=MOST_LAYERS // len(family.places))
    columns = [place.read(entries, count) for place in family.places]
    blocks = [name for block in zip(*columns, strict=True) for name in block]
    names = [*family.leading, *blocks]
    calls = {}
    for name in dict.fromkeys(names):
        role = family.roles[name]
        values = read_settings(entries, role.settings)
        options, joint = read_role(role, values, shared)
        call = call_of(role.layer, options, meaning_of_none(role, options, shared))
        joined = call_of(role.layer, joint, joint_defaults(shared)).options
        calls[name] = replace(call, options=(*call.options, *joined))
    return write_layers([(name, calls[name]) for name in names])


def read_settings(entries: Entries, settings: tuple[Setting, ...]) -> dict[str, object]:
    """The values of all settings."""
    values: dict[str, object] = {}
    for setting in settings:
        values |= setting.read(entries)
    return values


def read_role(role: Role, values: dict[str, object], shared: Config) -> tuple[Any, Joint]:
    """The options of a layer, and those that every layer has.

    Raises InputError, which names the entry, if a value is wrong or options do not fit each other.
    """
    given = [Option(name, "none" if value is None else value) for name, value in values.items()]
    call = Call(role.layer, options=tuple(given))
    try:
        found = read_call(call, "")
        with torch.device("meta"):
            build(replace(shared, layers=write_layers([("", call)])))
    except InputError as error:
        raise of_entry(error, role, values) from None
    return found


def of_entry(error: InputError, role: Role, values: dict[str, object]) -> InputError:
    """Turn an error about a layer's option, or a part of it, into one about the option's entry."""
    name, _, option = error.field.rpartition(": ")[2].partition(".")
    entry = role.entry_of(option)
    for outer, value in values.items():
        if isinstance(value, Call) and value.name == name:
            entry = f"{role.entry_of(outer)} {option}"
    return InputError(f"config.json {entry}", error.value, error.accepted)


def meaning_of_none(role: Role, options: Any, shared: Config) -> dict[str, object]:
    """Option -> the value that the layer uses if the option is None."""
    return {name: meaning(options, shared) for name, meaning in role.none.items()}


def joint_defaults(shared: Config) -> dict[str, object]:
    """The same for the options that every layer has."""
    return {name: getattr(shared, name) for name in ("residual", "residual_scale")}


# Writing.


def write_config(config: Config, origin: dict) -> tuple[str, dict]:
    """The first family that can express a Config, and its config.json.

    `origin` is the config.json from which the model was read, or {}; its family is tried first.
    Raises InputError if no family can express the Config.
    """
    families: dict[str, list[str]] = {}  # what differs -> families
    for name in sorted(FAMILIES, key=lambda name: name != origin.get("model_type")):
        try:
            return name, express(config, name, origin)
        except InputError as error:
            differing = error.field.removeprefix("config.json ").removeprefix("layers: ")
            families.setdefault(differing, []).append(name)
    order = families.pop("layers", [])  # the farthest
    # a family without an entry for something (a name without a dot) may differ in more
    rows = sorted(families.items(), key=lambda row: ("." not in row[0], row[0].count(",")))[:3]
    rows += [("which layers, in which order", order)] if order else []
    table = [f"  {differing}: {some(names)}" for differing, names in rows]
    table = ["  what differs: from which families, the closest first", *table]
    accepted = "a model that a published family can express"
    raise InputError("model", config.layers, accepted, "\n".join(table))


def some(names: list[str]) -> str:
    """The first of some names, and how many others there are."""
    others = f" and {len(names) - 4} others" if len(names) > 4 else ""
    return ", ".join(names[:4]) + others


def express(config: Config, name: str, origin: dict) -> dict:
    """The config.json of a family for a Config, with other entries of an `origin` of this family.

    Raises InputError if it would describe another model.
    """
    family, config = FAMILIES[name], replace(config, vocab=config.vocab or 256)
    if origin.get("model_type") != name:  # null, because the classes have defaults for these
        origin = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    entries = {family.aliases.get(entry, entry): value for entry, value in origin.items()}
    layers = assign(config, family)
    rows = layers[len(family.leading) :]
    blocks = len(rows) // len(family.places)
    spoken = [*family.fields, *family.places]
    used = dict.fromkeys(role for role, _ in layers)  # entries about other layers stay
    spoken += [setting for role in used for setting in family.roles[role].settings]
    owned = {entry for each in spoken for entry in each.names}
    entries = {entry: value for entry, value in entries.items() if entry not in owned}
    entries |= {"model_type": name, "architectures": [family.architecture], family.count: blocks}
    entries.pop("quantization_config", None)
    for setting in family.fields:
        entries |= setting.write(vars(config))
    for index, place in enumerate(family.places):
        entries |= place.write([role for role, _ in rows[index :: len(family.places)]])
    for role, options in dict(reversed(layers)).items():  # the first layer of each role
        for setting in family.roles[role].settings:
            merge(entries, setting.write(options))
    compare(config, read_config(entries, family), family)
    return entries


def assign(config: Config, family: Family) -> list[tuple[str, dict[str, Any]]]:
    """The role of each layer, and its options with None resolved.

    Raises InputError if the layers are not in the family's order.
    """
    found = []
    first = len(family.leading)
    if len(config.calls) < first or (len(config.calls) - first) % len(family.places):
        raise InputError("layers", config.layers, f"blocks of {len(family.places)} layers")
    for index, call in enumerate(config.calls):
        names = family.leading[index : index + 1]
        names = names or family.places[(index - first) % len(family.places)].roles
        roles = [name for name in names if family.roles[name].layer == call.name]
        if not roles or call.shared:
            raise InputError("layers", call.name, ", ".join(names))
        options, joint = read_call(call, config.layers)
        none = meaning_of_none(family.roles[roles[0]], options, config)
        none |= joint_defaults(config)
        values = {
            name: none.get(name) if value is None else value
            for name, value in {**vars(options), **vars(joint)}.items()
        }
        found.append((min(roles, key=lambda name: misfits(family.roles[name], values)), values))
    return found


def merge(entries: dict, more: dict) -> None:
    """Add entries to `entries`; an object is merged into an object of the same name."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(entries.get(name), dict):
            merge(entries[name], value)
        else:
            entries[name] = value


def misfits(role: Role, values: dict[str, Any]) -> int:
    """How many settings of a role do not fit a layer's options."""
    return sum(not each.fits(values) for each in role.settings)


def differ(one: object, other: object) -> bool:
    """Whether two values mean different models; the last digits of numbers may differ."""
    if type(one) is float and type(other) is float:
        return not math.isclose(one, other, rel_tol=1e-12)
    return one != other


def compare(config: Config, again: Config, family: Family) -> None:
    """Raise InputError, which names all that differs, unless both describe the same model."""
    differing = [
        field.name
        for field in fields(Config)
        if field.name not in ("layers", "impl")
        and differ(getattr(config, field.name), getattr(again, field.name))
    ]
    if [call.name for call in config.calls] != [call.name for call in again.calls]:
        raise InputError("layers", config.layers, again.layers)
    for (name, meant), (_, said) in zip(assign(config, family), assign(again, family), strict=True):
        role = family.roles[name]
        differing += [
            f"{role.layer}.{option}"
            for option in meant
            if differ(meant[option], said[option]) and option not in role.training
        ]
    if differing:
        raise InputError(", ".join(dict.fromkeys(differing)), config.layers, again.layers)
