"""All families, in the order in which the writer tries them. Add a family to its lineage's file."""

from minimodels.published import deepseek, gemma, gpt2, jamba, llama, mamba, mixtral, olmo

FAMILIES = {
    **llama.FAMILIES,
    **mamba.FAMILIES,
    **mixtral.FAMILIES,
    **jamba.FAMILIES,
    **olmo.FAMILIES,
    **gemma.FAMILIES,
    **deepseek.FAMILIES,
    **gpt2.FAMILIES,
}

HINTS = (mamba.original_format,)  # entries of a config.json without model_type -> what to do, or ""
