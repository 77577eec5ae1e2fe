"""All families, in the order in which the writer tries them. Add a family to its lineage's file."""

from minimodels.published import (
    deepseek,
    deltanet,
    gemma,
    gpt2,
    granite,
    jamba,
    kimi,
    lfm2,
    llama,
    mamba,
    mamba2,
    minimax,
    mixtral,
    nanochat,
    olmo,
    olmo_hybrid,
)

FAMILIES = {
    **llama.FAMILIES,
    **mamba.FAMILIES,
    **mixtral.FAMILIES,
    **jamba.FAMILIES,
    **olmo.FAMILIES,
    **gemma.FAMILIES,
    **deepseek.FAMILIES,
    **gpt2.FAMILIES,
    **mamba2.FAMILIES,
    **lfm2.FAMILIES,
    **deltanet.FAMILIES,
    **kimi.FAMILIES,
    **granite.FAMILIES,
    **nanochat.FAMILIES,
    **olmo_hybrid.FAMILIES,
    **minimax.FAMILIES,
}

REFUSED = {  # model_type -> what a Config can express instead
    "glm_moe_dsa": "a family whose layers choose their own keys; GLM-5's may reuse earlier ones",
}


def refused(entries: dict) -> str:
    """What to use instead of a known model_type that cannot be read, or ""."""
    name = entries.get("model_type")
    return REFUSED.get(name, "") if isinstance(name, str) else ""


HINTS = (mamba.original_format, refused)  # entries of a config.json -> what to do, or ""
