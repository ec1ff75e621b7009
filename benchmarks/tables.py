"""Tables of the documents, drawn from the records: what every report shares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

Records = list[dict[str, Any]]


def terminal() -> Console:
    """The terminal, or a log wide enough for a table: a log has no width of its own."""
    shown = Console()
    if not shown.is_terminal:
        shown.width = 140
    return shown


def read(path: Path) -> Records:
    """The records of a file, a line of JSON each.

    Raises:
        FileNotFoundError: there is none yet.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no records at {path}; run the benchmark they are of")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """In Markdown, names to the left and numbers to the right."""
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def fill(text: str, topic: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The text with what is between `<!-- TOPIC:NAME -->` and `<!-- /TOPIC -->` drawn anew.

    Raises:
        KeyError: the text has a block that nothing draws.
    """

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{blocks[match[2]]()}\n{match[3]}"

    pattern = rf"(<!-- {topic}:(\w+) -->)\n.*?(<!-- /{topic} -->)"
    return re.sub(pattern, block, text, flags=re.DOTALL)
