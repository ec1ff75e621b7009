"""An alarm said where somebody reads: the console, the run's JSON lines, and wandb."""

from __future__ import annotations

from pathlib import Path

import wandb
from sae_lens import logger

from jumprelu_plugin.training.health.alarms import Alarm
from jumprelu_plugin.training.metrics_file import append_metrics


def report(alarm: Alarm, metrics_path: Path | None, to_wandb: bool, of: str = "") -> None:
    """Say it once everywhere.

    Args:
        metrics_path: where the run's JSON lines go, if anywhere.
        of: which of several that train together, by name; the line then has it as `of`.
    """
    text = f"{of}, {alarm}" if of else str(alarm)
    logger.warning(text)
    if metrics_path is not None:
        words = {"alarm": alarm.name, "message": alarm.message, "suggestion": alarm.suggestion}
        append_metrics(metrics_path, {"step": alarm.step, **({"of": of} if of else {}), **words})
    if to_wandb and wandb.run is not None:
        wandb.run.alert(title=f"{of}: {alarm.name}" if of else alarm.name, text=text)
