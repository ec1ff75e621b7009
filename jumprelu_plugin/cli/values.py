"""How lists (0,1,3 or 0-5) and dictionaries (JSON) are written, the same in every command."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_RANGE = re.compile(r"(\d+)-(\d+)")


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """The numbers in a list such as 0,1,3 or 0-5,8.

    Raises:
        ValueError: it is no such list; the message names the flag.
    """
    found: list[int] = []
    for part in text.split(","):
        ends = _RANGE.fullmatch(part.strip())
        try:
            numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else [int(part)]
        except ValueError:
            numbers = []
        if not numbers:
            raise ValueError(f"{flag} is {text!r}; give numbers such as 0,1,3 or 0-5")
        found += numbers
    return tuple(found)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """The numbers in a list such as 10,20.5,-3.

    Raises:
        ValueError: it is no such list; the message names the flag.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{flag} is {text!r}; give numbers such as 10,20,40")
    return found


def names_and_values(flag: str, text: str) -> dict[str, Any]:
    """The dictionary in JSON such as {"dtype": "bfloat16"}.

    Raises:
        ValueError: it is no such JSON; the message names the flag.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} is {text!r}; give JSON such as " + '{"dtype": "bfloat16"}')
    return found
