"""Measurements. Most modules are commands that print a table and write JSON rows. The others
contain what these commands share."""
