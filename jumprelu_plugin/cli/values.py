"""How dictionaries (JSON) are written, the same in every command."""

from __future__ import annotations

import json
from typing import Any


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
