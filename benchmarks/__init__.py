"""Measurements. Most modules are a command that prints a table and writes JSON rows; the others hold what these share."""
