"""The raters' answers on disk: one append-only file a rater, one line for each change.

A line is written in one call and flushed to the disk before the server acknowledges it. A line
holds only what changed, so two tabs do not overwrite each other's fields. The last line that sets
a field counts; earlier ones stay as history.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jumprelu_plugin.studies.utf8 import as_utf8

RATINGS = ("yes", "maybe", "no")
MOST_CHARACTERS = 4000


@dataclass
class Answers:
    """A rater's answers.

    Attributes:
        by_item: for each item, its `rating` (one of `RATINGS`) and `text`, as far as given.
        damaged_lines: numbers of lines that were not whole and were left out, from 1.
    """

    by_item: dict[str, dict[str, str]] = field(default_factory=dict)
    damaged_lines: list[int] = field(default_factory=list)

    def rated(self) -> dict[str, str]:
        """The rating of each item that has one."""
        return {item: a["rating"] for item, a in self.by_item.items() if "rating" in a}


def checked_change(change: Any) -> dict[str, str]:
    """A change that is safe to store: an item, and a rating or a text or both.

    Lone surrogates of the text are replaced.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(change, dict) or not isinstance(change.get("item"), str):
        raise ValueError("a change names its item")
    if set(change) - {"item", "rating", "text"} or len(change) < 2:
        raise ValueError("a change holds item, and rating or text or both")
    if "rating" in change and change["rating"] not in RATINGS:
        raise ValueError(f"rating is one of {', '.join(RATINGS)}")
    text = change.get("text", "")
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise ValueError(f"text has at most {MOST_CHARACTERS} characters")
    return {**change, "text": as_utf8(text)} if "text" in change else dict(change)


def append_change(path: Path, change: dict[str, str]) -> None:
    """Append a change and return when it is on the disk.

    A line that a crash cut short is ended first, so that it spoils only itself. Processes that
    write to one file wait for each other.
    """
    line = {**change, "time_utc": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
    is_new = not path.exists()
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = b"\n" + content
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_folder(path.parent)


def read_answers(path: Path) -> Answers:
    """The answers in a file; those of a file that is not there are none."""
    answers = Answers()
    if not path.is_file():
        return answers
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            stored = json.loads(line)
            change = checked_change({k: v for k, v in stored.items() if k != "time_utc"})
        except (ValueError, AttributeError):
            answers.damaged_lines.append(number)
            continue
        answers.by_item.setdefault(change.pop("item"), {}).update(change)
    return answers


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
