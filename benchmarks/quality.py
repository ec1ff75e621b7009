"""The common part of the quality benchmarks: training, records, and a table."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.tables import read
from jumprelu_plugin.records import append_jsonl

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


def batches(
    rows: Float[Tensor, "rows d"],
    size: int,
    seed: int,
    center: Float[Tensor, " d"] | None = None,
) -> Iterator[Float[Tensor, "batch d"]]:
    """Endless batches less `center`, in a random order that depends on the seed."""
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=random)
        for start in range(0, len(order) - size + 1, size):
            batch = rows[order[start : start + size]].float()
            yield batch if center is None else batch - center


def trainer_config(steps: int, batch: int, lr: float) -> SAETrainerConfig:
    """SAELens' trainer as all of these benchmarks use it."""
    return SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=20,
    )


def train(
    sae: Any,
    rows: Float[Tensor, "rows d"],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    center: Float[Tensor, " d"] | None = None,
) -> float:
    """Train in place on rows less `center` with SAELens' trainer; return the seconds."""
    cfg = trainer_config(steps, batch, lr)
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches(rows, batch, seed, center))
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def as_saved(sae: Any, center: Float[Tensor, " d"] | None = None) -> Any:
    """The SAE as stock SAELens loads it after training, with `center` put back.

    Raises:
        ValueError: there is a center, and the SAE does not subtract b_dec from its input.
    """
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    if center is not None:
        if not saved.cfg.apply_b_dec_to_input:
            raise ValueError("b_dec can hold the center only where it is subtracted from the input")
        saved.b_dec.data += center
    return saved


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
