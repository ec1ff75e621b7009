"""The common part of the quality benchmarks: training, records, and a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from benchmarks.tables import read
from jumprelu_plugin.records import append_jsonl
from jumprelu_plugin.studies.sweep import training
from jumprelu_plugin.studies.sweep.training import as_saved, batches, trainer_config

__all__ = ["Record", "RecordFile", "as_saved", "batches", "table", "train", "trainer_config"]

Record = dict[str, Any]


class RecordFile:
    """A file of records, one line of JSON for each case, written when it is measured.

    A case that is in the file is not measured again, so an interrupted benchmark continues where it
    stopped. Delete a case's line to measure it again. Every line has its own provenance.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: list[Record] = read(path) if path.exists() else []

    def record(self, case: Record, measure: Callable[[], Record], origin: Record) -> Record:
        """The record of `case`, from the file or from calling `measure`."""
        for known in self._known:
            if all(known.get(name) == value for name, value in case.items()):
                return known
        record = {**case, **measure()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {**record, "provenance": origin})
        return record


def train(
    sae: Any,
    rows: Float[Tensor, "rows d"],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    center: Float[Tensor, " d"] | None = None,
    decay: float = 0.2,
) -> float:
    """Train in place on rows less `center` with SAELens' trainer; return the seconds.

    Args:
        decay: the part of the run, at its end, in which the learning rate falls.
    """
    source, cfg = batches(rows, batch, seed, center), trainer_config(steps, batch, lr, decay=decay)
    return training.train(sae, source, cfg).seconds


def table(title: str, records: list[dict[str, Any]], by: str, metrics: tuple[str, ...]) -> Table:
    """Mean ± standard deviation of each metric, over the records with the same value of `by`."""
    shown = Table(title=title)
    shown.add_column(by)
    for metric in metrics:
        shown.add_column(metric, justify="right")
    for name in dict.fromkeys(record[by] for record in records):
        cells = []
        for metric in metrics:
            values = [record[metric] for record in records if record[by] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        shown.add_row(str(name), *cells)
    return shown
