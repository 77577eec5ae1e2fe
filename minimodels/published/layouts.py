"""Which layers a config.json describes, and its rotary positions: read and written.

Functions that end in `_layers` or `blocks` read: entries of config.json -> fields of Config, `layers` among them. Those that
start with `outline` write: layers and window -> entries. What they write is checked by reading it, so they need not foresee
layers that their family cannot express.
"""

from __future__ import annotations

from collections.abc import Callable

from minimodels.config import MOST_LAYERS, Layers
from minimodels.errors import LARGEST, InputError
from minimodels.grammar import parse_scaling


class Entries(dict):
    """What a config.json holds. It notes what it is asked for, so that no entry is passed over unseen."""

    def __init__(self, entries: dict):
        super().__init__({name: value for name, value in entries.items() if value is not None})
        self.told = set(entries)  # null included
        self.asked: set[str] = set()

    def get(self, name: str, absent: object = None) -> object:
        """The value of an entry, or `absent`."""
        self.asked.add(name)
        return super().get(name, absent)


def number(
    entries: Entries, name: str, absent: int | None = None, least: int = 1, most: int = MOST_LAYERS
) -> int:
    """A whole number that a config.json must, or may, hold."""
    value = entries.get(name, absent)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"config.json {name}", value, f"a whole number from {least} to {most}")
    return value


def blocks(*layers: str) -> Callable[[Entries], dict[str, object]]:
    """Every block the same."""
    return lambda entries: {"layers": " ".join(layers * number(entries, "num_hidden_layers"))}


def outline_blocks(per_block: int) -> Callable[[Layers, int], dict]:
    """The same, written."""
    return lambda layers, window: {"num_hidden_layers": len(layers) // per_block}


def llama_blocks(entries: Entries) -> dict[str, object]:
    """Every block the same; the class wants heads that divide the width, even where head_dim is told."""
    width, heads = (
        number(entries, "hidden_size", most=LARGEST),
        number(entries, "num_attention_heads", most=LARGEST),
    )
    if width % heads:
        raise InputError(
            "config.json num_attention_heads", heads, f"a divisor of hidden_size {width}"
        )
    return blocks("attention", "mlp")(entries)


def mamba_blocks(entries: Entries) -> dict[str, object]:
    """Every block the same; intermediate_size, where it is told, goes before expand."""
    width, inner = (
        number(entries, "hidden_size", most=LARGEST),
        number(entries, "intermediate_size", 0, 0, LARGEST),
    )
    if inner % width or (inner == 0 and "intermediate_size" in entries):
        raise InputError(
            "config.json intermediate_size", inner, f"a multiple of hidden_size {width}"
        )
    return {**({"expand": inner // width} if inner else {}), **blocks("mamba")(entries)}


def window_of(entries: Entries, absent: int | None, used: bool = True) -> dict[str, object]:
    """The field `window`, if there is one and it is `used`. `absent` is what the family takes sliding_window for where it is
    not told; null is no window."""
    window = entries.get("sliding_window", None if "sliding_window" in entries.told else absent)
    return (
        {"window": number(entries, "sliding_window", absent, most=LARGEST)}
        if used and window is not None
        else {}
    )


def windowed_blocks(mlp: str, absent: int | None = None) -> Callable[[Entries], dict[str, object]]:
    """Every block the same, with a window or without; `absent` is the window where none is told."""

    def layers(entries: Entries) -> dict[str, object]:
        window = window_of(entries, absent)
        return {**window, **blocks("window" if window else "attention", mlp)(entries)}

    return layers


def outline_windowed(layers: Layers, window: int) -> dict:
    """The same, written."""
    return {
        "num_hidden_layers": len(layers) // 2,
        "sliding_window": window if "window" in layers else None,
    }


def qwen3_layers(entries: Entries) -> dict[str, object]:
    """Each block's kind is listed; if not, those from max_window_layers on have the window."""
    count, window = (
        number(entries, "num_hidden_layers"),
        window_of(entries, 4096, entries.get("use_sliding_window", False)),
    )
    kinds, first = entries.get("layer_types"), number(entries, "max_window_layers", 28, least=0)
    if kinds is None:
        first = first if window else count
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    ours = {"full_attention": "attention", "sliding_attention": "window"}
    if (
        type(kinds) is not list
        or len(kinds) != count
        or not all(type(kind) is str and kind in ours for kind in kinds)
    ):
        raise InputError(
            "config.json layer_types", kinds, f"{count} times one of {', '.join(ours)}"
        )
    if "sliding_attention" in kinds and not window:
        raise InputError(
            "config.json sliding_window",
            None,
            "a whole number, for layer_types has sliding_attention",
        )
    return {**window, "layers": " ".join(f"{ours[kind]} mlp" for kind in kinds)}


def outline_qwen3(layers: Layers, window: int) -> dict:
    """The same, written."""
    kinds = {"attention": "full_attention", "window": "sliding_attention"}
    used = "window" in layers
    return {
        "num_hidden_layers": len(layers) // 2,
        "layer_types": [kinds.get(layer, layer) for layer in layers[::2]],
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "max_window_layers": len(layers) // 2,
    }


def qwen3_moe_layers(entries: Entries) -> dict[str, object]:
    """Every decoder_sparse_step-th block has experts, those in mlp_only_layers apart."""
    step, dense = number(entries, "decoder_sparse_step", 1), entries.get("mlp_only_layers") or []
    if type(dense) is not list or not all(type(i) is int for i in dense):
        raise InputError("config.json mlp_only_layers", dense, "a list of whole numbers")
    window = window_of(entries, 4096, entries.get("use_sliding_window", False))
    mixer = "window" if window else "attention"
    mlps = [
        "moe" if (i + 1) % step == 0 and i not in dense else "mlp"
        for i in range(number(entries, "num_hidden_layers"))
    ]
    return {**window, "layers": " ".join(f"{mixer} {mlp}" for mlp in mlps)}


def outline_qwen3_moe(layers: Layers, window: int) -> dict:
    """The same, written."""
    return {
        **outline_windowed(layers, window),
        "use_sliding_window": "window" in layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(layers[1::2]) if layer == "mlp"],
    }


def periodic(name: str, entries: Entries) -> Callable[[int], bool]:
    """Whether block i is one of those at `offset` in each `period`."""
    period = number(entries, f"{name}_layer_period")
    offset = number(entries, f"{name}_layer_offset", least=0, most=period - 1)
    return lambda i: i % period == offset


def jamba_layers(entries: Entries) -> dict[str, object]:
    """Attention at one place in each period, Mamba elsewhere; experts at one place in each of another period."""
    attention, experts = periodic("attn", entries), periodic("expert", entries)
    mixers = [
        "attention" if attention(i) else "mamba"
        for i in range(number(entries, "num_hidden_layers"))
    ]
    routed = number(entries, "num_experts") > 1
    return {
        "layers": " ".join(
            f"{mixer} {'moe' if routed and experts(i) else 'mlp'}" for i, mixer in enumerate(mixers)
        )
    }


def outline_jamba(layers: Layers, window: int) -> dict:
    """The same, written."""

    def period(name: str, kind: str, where: Layers) -> dict:
        places = [i for i, layer in enumerate(where) if layer == kind]
        offset = places[0] if places else len(where)
        step = places[1] - offset if len(places) > 1 else len(where) + 1
        return {f"{name}_layer_period": step, f"{name}_layer_offset": offset}

    return {
        "num_hidden_layers": len(layers) // 2,
        **period("attn", "attention", layers[::2]),
        **period("expert", "moe", layers[1::2]),
    }


# The rotary positions, read and written.

ROPE = {  # rope_type -> its parameters -> their names in Config.rope_scaling
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "context",
    },
}


def read_rope(entries: Entries, base: float) -> dict[str, object]:
    """rope_base and rope_scaling, from either way in which a config.json may tell them."""
    newer, older = entries.get("rope_parameters", {}), entries.get("rope_scaling", {})
    if not isinstance(newer, dict) or not isinstance(older, dict):
        raise InputError("config.json rope_parameters", newer or older, "a JSON object")
    if newer and older and newer != older:
        raise InputError(
            "config.json rope_scaling", older, "what rope_parameters says, or no such entry"
        )
    rope = {"rope_theta": entries.get("rope_theta", base), **older, **newer}
    kind, theta = rope.pop("type", "default"), rope.pop("rope_theta")
    kind = rope.pop("rope_type", kind)
    if not isinstance(kind, str) or kind not in ROPE:
        raise InputError("config.json rope_type", kind, ", ".join(ROPE))
    if type(theta) not in (int, float) or not 0 < theta <= 1e300:
        raise InputError("config.json rope_theta", theta, "a positive number up to 1e300")
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", entries.get("max_position_embeddings"))
    if sorted(rope) != sorted(ROPE[kind]):
        raise InputError(
            f"config.json parameters of rope_type {kind}",
            sorted(rope),
            ", ".join(ROPE[kind]) or "none",
        )
    options = ",".join(f"{ours}={rope[theirs]!r}" for theirs, ours in ROPE[kind].items())
    return {"rope_base": float(theta), "rope_scaling": f"{kind}:{options}" if options else ""}


def write_rope(base: float, scaling: str) -> dict:
    """The same, written."""
    kind, options = parse_scaling(scaling)
    parameters = {theirs: options[ours] for theirs, ours in ROPE[kind or "default"].items()}
    if kind == "llama3":
        parameters["original_max_position_embeddings"] = int(options["context"])
    return {
        "rope_parameters": {"rope_type": kind or "default", "rope_theta": float(base), **parameters}
    }
