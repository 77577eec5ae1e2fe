"""What models are trained on: text, as bytes or tokens, cut at random or packed by document, alone or mixed; synthetic tasks.

`open_data` in text.py opens all of it by name. Below it: files.py finds files, formats.py reads them, corpus.py splits them,
cache.py keeps what was made of them, tokenizer.py and tokens.py make tokens, windows.py, documents.py and mixture.py batches.
"""
