"""A run's metrics: JSON lines that end no training, and that a resumed run does not repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import logger

from jumprelu_plugin.records import append_jsonl, write_text

_refused: set[Path] = set()
_written: set[Path] = set()


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append a line; where the disk refuses it, warn once and leave the line out."""
    if path in _written and not path.exists():
        logger.warning(f"{path} is gone, with the lines before this one; it is begun anew")
        _written.discard(path)
    try:
        append_jsonl(path, line)
    except OSError as error:
        if path not in _refused:
            logger.warning(
                f"metrics are not written to {path}: {error}. Training goes on; make room, or make "
                "it writable"
            )
        _refused.add(path)
    else:
        _refused.discard(path)
        _written.add(path)


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, int | float | None]:
    """The numbers among the metrics; those that are not finite as null, which JSON has."""
    return {
        name: value if math.isfinite(value) else None
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


def keep_before(path: Path, step: int) -> None:
    """Drop the lines from a step on: a run that was killed after its last checkpoint takes those
    steps again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step(line) < step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")  # a line that a crash cut off
    except (TypeError, KeyError):
        return -1.0
