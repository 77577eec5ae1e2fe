"""Quantities that change during a run: `context=256:2048@0.5 batch_size=8:32@0.25`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from minimodels.errors import InputError

WHOLE = ("context", "batch_size")  # quantities that are whole numbers
RAMP = re.compile(r"(\w+)=([^\s:=@]+):([^\s:=@]+)(?:@([^\s:=@]+))?")
ACCEPTED = (
    "NAME=FIRST:LAST or NAME=FIRST:LAST@PROGRESS, such as context=64:256@0.5; NAME is {names}; "
    "FIRST and LAST are above 0, PROGRESS is above 0 and at most 1"
)


def ramp(text: str, progress: float, names: Collection[str] = WHOLE) -> dict[str, int | float]:
    """The value of each quantity in a text at a progress between 0 and 1.

    "context=256:2048@0.5" grows from 256 at the beginning to 2048 halfway through the run, and then
    stays. Without "@", it reaches its last value at the end. `context` and `batch_size` are whole
    numbers. They change in steps of the smaller value, so that few shapes appear (256, 512, 768
    ...). Others, such as the weights of a mixture, change evenly. Raises InputError if the text is
    not a ramp.
    """
    values = {}
    for part in text.split():
        name, first, last, arrival = parse_ramp(part, names)
        if name in values:
            raise InputError("ramp", part, f"one ramp for {name}")
        done = min(max(progress, 0.0) / arrival, 1.0)
        value = first + (last - first) * done
        if name in WHOLE and done < 1:
            unit = min(first, last)
            value = int(value // unit * unit)
        values[name] = value if name not in WHOLE or done < 1 else last
    return values


def parse_ramp(part: str, names: Collection[str]) -> tuple[str, float, float, float]:
    """ "context=256:2048@0.5" -> ("context", 256, 2048, 0.5)."""
    found = RAMP.fullmatch(part)
    accepted = ACCEPTED.format(names=" or ".join(names))
    if not found or found[1] not in names:
        raise InputError("ramp", part, accepted)
    try:
        number = int if found[1] in WHOLE else float
        first, last, arrival = number(found[2]), number(found[3]), float(found[4] or 1)
    except ValueError:
        raise InputError("ramp", part, accepted) from None
    if not (0 < first < math.inf and 0 < last < math.inf and 0 < arrival <= 1):
        raise InputError("ramp", part, accepted)
    return found[1], first, last, arrival
