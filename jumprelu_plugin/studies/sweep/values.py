"""Reads the values of a grid's fields, from Python or YAML; a wrong type is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from jumprelu_plugin.models import number_lists


def whole_number(name: str, value: Any) -> int:
    """An int, also from 64.0 or from the text 1e6, which YAML does not take for a number."""
    found = _number(value)
    if found is None or found != int(found):
        raise ValueError(f"{name} is {value!r}; expected a whole number")
    return int(found)


def number(name: str, value: Any) -> float:
    """A finite number, also from the text 1e-3, which YAML does not take for one."""
    found = _number(value)
    if found is None:
        raise ValueError(f"{name} is {value!r}; expected a number")
    return found


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """One whole number, a list of them, or text as the command line takes it, such as 0,1 or 0-3.

    Raises:
        ValueError: it is neither.
    """
    found: list[int] = []
    for each in _listed(value):
        if isinstance(each, str):
            found += number_lists.whole_numbers(name, each)
            continue
        one = _number(each)
        if one is None or one != int(one):
            raise ValueError(f"{name} is {value!r}; expected whole numbers such as 0,1,3 or 0-5")
        found.append(int(one))
    return tuple(found)


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number, a list of them, or text as the command line takes it, such as 20,40."""
    found: list[float] = []
    for each in _listed(value):
        if isinstance(each, str):
            found += number_lists.numbers(name, each)
            continue
        one = _number(each)
        if one is None:
            raise ValueError(f"{name} is {value!r}; expected numbers such as 10,20,40")
        found.append(one)
    return tuple(found)


def text(name: str, value: Any) -> str:
    """Text; a path becomes text."""
    if not isinstance(value, str | Path):
        raise ValueError(f"{name} is {value!r}; expected text")
    return str(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts, or one text with commas between them, as the command line takes it."""
    found = value.split(",") if isinstance(value, str) else _listed(value)
    if not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name} is {value!r}; expected a list of names")
    return tuple(stripped for each in found if (stripped := each.strip()))


def names_and_values(name: str, value: Any) -> dict[str, Any]:
    """A mapping from names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is {value!r}; expected names and values, such as dtype: bfloat16")
    return dict(value)


def rates(name: str, value: Any) -> float | dict[str, float]:
    """One number, or a mapping from names to numbers."""
    if not isinstance(value, Mapping):
        return number(name, value)
    return {key: number(f"{name} of {key}", rate) for key, rate in value.items()}


def _number(value: Any) -> Any:
    """The finite number that a value or its text is, an int where it is one; None if it is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _listed(value: Any) -> list[Any]:
    """The entries of a list; another value is the only entry."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return list(value) if is_list else [value]
