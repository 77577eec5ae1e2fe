"""Published models in the Hugging Face format, read and written.

    model = from_pretrained("folder-or-hub/id")        an LM with the published weights
    save_pretrained(model, "folder")                   what transformers.AutoModelForCausalLM loads

    python -m minimodels.published RUN FOLDER          the same for a training run

A family is one `model_type`. Each lineage of families has a file of tables (llama.py, mamba.py,
...), and families.py lists them all. The reader and the writer know a family only by its table:

    pretrained.py    from_pretrained, save_pretrained, the files beside the weights
    config_json.py   config.json <-> Config, whose layers are a text
    family.py        the form of a table
    entries.py       entries of config.json <-> options of layers
    places.py        entries of config.json <-> which layer is where
    mappings.py      how parts of our layers are stored: stacked, fused, transposed, ...
    rope.py          rotary positions
    tensors.py       tensors in safetensors files <-> parts of our layers
    text.py          a short text for many layers
"""

from minimodels.published.pretrained import Published, from_pretrained, save_pretrained

__all__ = ["Published", "from_pretrained", "save_pretrained"]
