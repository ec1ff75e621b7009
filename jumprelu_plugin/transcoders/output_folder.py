"""The folder a long run writes to: claimed for one run, continued by it, refused to others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

SETTINGS_FILENAME = "unfinished.json"
CHECKPOINTS = "checkpoints"
METRICS_FILENAME = "metrics.jsonl"


def claim_output_folder(output: Path, settings: Any, record_filename: str) -> Path | None:
    """Make `output` ours, and find the checkpoint to go on from, None for a fresh start.

    Args:
        settings: a dataclass; what an unfinished run in `output` must have been begun with.
        record_filename: what a finished run leaves.

    Raises:
        ValueError: `output` holds a finished run, one with other settings, or something else.
    """
    if (output / record_filename).exists():
        raise ValueError(
            f"{output} already holds finished transcoders ({record_filename}); give another folder"
        )
    begun = output / SETTINGS_FILENAME
    if not begun.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no unfinished run; give another")
        output.mkdir(parents=True, exist_ok=True)
        return None
    # A setting that the version which began the run did not have is at its default.
    before = {**_plain(type(settings)()), **json.loads(begun.read_text())}
    now = _plain(settings)
    different = [name for name in before if before[name] != now.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{output} holds an unfinished run with {name}={before[name]!r}, and {name} is "
            f"{now.get(name)!r} now: give the same settings to continue it, or another folder"
        )
    saved = sorted(
        (path for path in (output / CHECKPOINTS).glob("[0-9]*")), key=lambda path: int(path.name)
    )
    if not saved:
        (output / METRICS_FILENAME).unlink(missing_ok=True)
    return saved[-1] if saved else None


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))
