"""The help of a dataclass's fields, from where they are documented already: its docstring."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(r"(?:Args|Attributes):")
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?: \(.*?\))?: +(?P<text>.*)")


def field_help(cls: type) -> dict[str, str]:
    """What the sections "Args:" and "Attributes:" say of each field, a class before its bases.

    An entry may document several fields (`hook_name, hook_name_out: …`) and give types in
    parentheses, as SAELens' do.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found.update(_entries(inspect.cleandoc(vars(base).get("__doc__") or "")))
    return found


def _entries(docstring: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    inside, depth = False, 0
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0 and line:
            inside, names, depth = bool(_SECTION.fullmatch(line)), [], 0
        elif inside and line.strip():
            depth = depth or indent
            entry = _ENTRY.fullmatch(line.strip()) if indent == depth else None
            if entry:
                names = entry["names"].split(", ")
                text = entry["text"]
            else:
                text = f"{found[names[0]]} {line.strip()}" if names else ""
            found.update(dict.fromkeys(names, text))
    return found
