"""Measurements. Most modules are commands that print a table and write JSON rows. The others
contain what these commands share."""

import minimodels  # noqa: F401, first, so that Ctrl-C ends the other imports at once
