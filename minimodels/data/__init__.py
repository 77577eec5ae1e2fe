"""Training data: bytes or tokens of text, cut at random or packed by document, alone or
mixed; and synthetic tasks.

`open_data` in text.py opens all of it by name. files.py finds files, formats.py reads them and
corpus.py splits them. cache.py stores the results. tokenizer.py and tokens.py make tokens.
windows.py, documents.py and mixture.py make batches.
"""
