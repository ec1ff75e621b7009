"""A file of records, a line of JSON each, that a process may be killed in the middle of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import append_jsonl, write_text

Record = dict[str, Any]


def read_records(path: str | Path) -> tuple[list[Record], str | None]:
    """The records of a file, and what follows the last whole line: None, or a broken line.

    Raises:
        ValueError: a line before the last one is no record, or the file has none.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no records at {path}; run jumprelu sweep first")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif not any(rest.strip() for rest in lines[number:]):
            return records, line
        else:
            raise ValueError(
                f"{path}: line {number} is no record ({line[:60]!r}…). Repair or remove that line; "
                "its SAE is then trained again unless its folder holds record.json"
            )
    return records, None


def _record(line: str) -> Record | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def without_broken_line(path: Path) -> tuple[list[Record], str | None]:
    """As `read_records`, and a broken last line is moved out of the file, into `….broken`.

    A file that is not there has no records.
    """
    if not path.is_file():
        return [], None
    records, broken = read_records(path)
    if broken is not None:
        write_text(path.with_name(f"{path.name}.broken"), broken + "\n")
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
        write_text(path, "".join(f"{line}\n" for line in lines))
    return records, broken


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record, and return when it is on disk."""
    append_jsonl(path, record)
    with path.open("rb") as file:
        os.fsync(file.fileno())
