"""All families, in the order in which a model made here tries them. A family joins in its lineage's file."""

from minimodels.published import (
    deepseek,
    deltanet,
    gemma,
    gpt2,
    jamba,
    lfm2,
    llama,
    mamba,
    mamba2,
    mixtral,
    olmo,
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
}

HINTS = (mamba.original_format,)  # entries of a config.json without model_type -> what to do, or ""
