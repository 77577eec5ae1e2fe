"""One colour for each architecture, in every picture."""

from __future__ import annotations

COLOURS = {  # of layers
    "attention": "#2563eb",
    "mlp": "#6b7280",
    "mamba": "#dc2626",
    "moe": "#059669",
    "mod": "#d97706",
    "mamba2": "#ec4899",
    "retention": "#0891b2",
    "deltanet": "#65a30d",
    "short_convolution": "#92400e",
    "latent_attention": "#1e3a8a",
    "sparse_attention": "#9333ea",
    "differential_attention": "#60a5fa",
    "learned_positions": "#a8a29e",
}
COLOURS |= {  # of presets
    "transformer": COLOURS["attention"],
    "dense": COLOURS["attention"],
    "hybrid": "#7c3aed",
    "linear_attention": "#67e8f9",
    "retnet": COLOURS["retention"],
    "lightning": "#155e75",
    "gla": "#14b8a6",
    "gated_deltanet": "#3f6212",
    "kda": "#a3e635",
    "deltaproduct": "#eab308",
    "qwen_next": "#c026d3",
    "olmo_hybrid": "#f472b6",
    "kimi_linear": "#4c1d95",
    "nemotron_h": "#9f1239",
}
OTHERS = ("#111827", "#4b5563", "#78350f", "#be185d", "#0f766e", "#4338ca", "#b45309")
