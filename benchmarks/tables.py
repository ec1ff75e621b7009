"""What every report shares: records read, Markdown tables, and documents filled with them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from jumprelu_plugin.records import read_jsonl

Records = list[dict[str, Any]]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FIGURES = ROOT / "docs" / "figures"


def terminal() -> Console:
    """The terminal, or a log wide enough for a table: a log has no width of its own."""
    shown = Console()
    if not shown.is_terminal:
        shown.width = 140
    return shown


def read(path: Path) -> Records:
    """The records of a file, a line of JSON each.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line of it is no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no records at {path}; run the benchmark they are of")
    return read_jsonl(path)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]], names: int = 1) -> str:
    """In Markdown, the first `names` columns to the left and numbers to the right."""
    rule = "|" + "|".join("---" if i < names else "---:" for i in range(len(header))) + "|"
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


def commits(records: Records) -> str:
    """The commits that gave these records, oldest first: "commit 1234567890" or several."""
    found: dict[str, bool] = {}
    for record in sorted(records, key=lambda record: record["provenance"]["time_utc"]):
        git = record["provenance"]["git"]
        if git is not None:
            commit = git["commit"][:10]
            found[commit] = found.get(commit, False) or git["modified"]
    if not found:
        return "an unknown commit"
    names = [f"{commit}{'*' if modified else ''}" for commit, modified in found.items()]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    note = " (* with uncommitted changes)" if any(found.values()) else ""
    return f"commit{'s' if len(names) > 1 else ''} {listed}{note}"


def mean(records: Records, name: str) -> float:
    """The mean of a number over records."""
    return statistics.mean(record[name] for record in records)


def spread(records: Records, name: str, digits: int) -> str:
    """Mean ± standard deviation over records; the mean alone where there is one record."""
    values = [record[name] for record in records]
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def seconds(value: float) -> str:
    """Seconds with three digits, as the tables show them."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
