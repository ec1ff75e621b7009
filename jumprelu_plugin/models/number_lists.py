"""How lists of numbers are given: as text (0,1,3 or 0-5), the same on the command line and in a
grid, or in Python."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
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


def plain_integers(name: str, given: Any) -> tuple[int, ...]:
    """One number or several, of Python, NumPy or PyTorch, as Python's.

    Raises:
        ValueError: one of them is no whole number. A mask's True and False are none.
    """
    listed = given.tolist() if hasattr(given, "tolist") else given
    each = [
        number.item() if hasattr(number, "item") else number
        for number in (listed if isinstance(listed, Iterable) else [listed])
    ]
    if any(isinstance(number, bool) for number in each):
        raise ValueError(
            f"{name} must be whole numbers; got {given!r}. Of a mask, give the places that are True"
            " (mask.nonzero().flatten())."
        )
    if not all(isinstance(number, int) for number in each):
        raise ValueError(f"{name} must be whole numbers; got {given!r}.")
    return tuple(each)
