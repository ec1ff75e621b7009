"""The output folder of a long run: a run that stopped continues in it, any other is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import read_json

SETTINGS_FILENAME = "unfinished.json"
CHECKPOINTS = "checkpoints"
METRICS_FILENAME = "metrics.jsonl"


def claim_output_folder(output: Path, settings: Any, record_filename: str) -> Path | None:
    """The last checkpoint of an unfinished run in `output`; None if the run is to start fresh.

    Args:
        output: it may be missing or empty; nothing is written to it here.
        settings: a dataclass; an unfinished run in `output` must have been started with the same.
        record_filename: the file that a finished run leaves in `output`.

    Raises:
        ValueError: `output` holds a finished run, a run with other settings, or other files.
    """
    if (output / record_filename).exists():
        raise ValueError(
            f"{output} already holds finished transcoders ({record_filename}); give another folder"
        )
    started = output / SETTINGS_FILENAME
    if not started.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no unfinished run; give another")
        return None
    # A setting that the version which started the run did not have is at its default.
    before = {**_plain(type(settings)()), **read_json(started)}
    now = _plain(settings)
    different = [name for name in before if before[name] != now.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{output} holds an unfinished run with {name}={before[name]!r}, and {name} is "
            f"{now.get(name)!r} now: give the same settings to continue it, or another folder"
        )
    saved = sorted(
        (path for path in (output / CHECKPOINTS).glob("*") if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    if not saved:
        (output / METRICS_FILENAME).unlink(missing_ok=True)
    return saved[-1] if saved else None


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))
