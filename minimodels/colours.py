"""One colour for each architecture, in every picture."""

from __future__ import annotations

COLOURS = {  # of layers, and of the presets that mix several
    "attention": "#2563eb",
    "mlp": "#6b7280",
    "mamba": "#dc2626",
    "moe": "#059669",
    "mod": "#d97706",
    "mamba2": "#ec4899",
    "retention": "#0891b2",
    "deltanet": "#84cc16",
    "short_convolution": "#92400e",
    "hybrid": "#7c3aed",
}
COLOURS |= {"transformer": COLOURS["attention"], "dense": COLOURS["attention"]}
OTHERS = ("#c026d3", "#111827", "#4b5563")  # of whatever has no colour of its own
