"""Builds and trains the SAEs of a sweep's cells, one alone or several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.studies.sweep.architectures import (
    ARCHITECTURES,
    centers_itself,
    lr_decay_fraction,
)
from jumprelu_plugin.studies.sweep.grid import Cell, SweepSettings
from jumprelu_plugin.studies.sweep.measures import PeakMemory
from jumprelu_plugin.studies.sweep.together import train_together
from jumprelu_plugin.studies.sweep.training import TrainingRun, less, train, trainer_config
from jumprelu_plugin.training.activations.cache.reader import ActivationCache, CacheBatches


@dataclass(frozen=True)
class TrainedCell:
    """An SAE and what its training took.

    Attributes:
        sae: on the CPU.
        center: what was subtracted from its data; None for an SAE that does it itself.
        run: seconds and samples.
        memory: peak memory, of SAEs trained together each one's share; None if not known.
    """

    sae: Any
    center: Tensor | None
    run: TrainingRun
    memory: int | None


def train_cells(
    cells: Sequence[Cell],
    settings: SweepSettings,
    cache: ActivationCache,
    on_step: Callable[[int], None],
) -> list[TrainedCell]:
    """Train the SAEs of cells, together if there are several.

    Args:
        cells: one of any architecture, or several of one that may be trained together.
        on_step: called with a cell's place after each of its steps.
    """
    if len(cells) > 1:
        return _train_together(cells, settings, cache, on_step)
    return [_train(cells[0], settings, cache, lambda: on_step(0))]


def learning_rate_of(cell: Cell, settings: SweepSettings, d_in: int) -> float:
    """The learning rate that a cell is trained with."""
    if cell.lr is not None:
        return cell.lr
    batch, steps = settings.train_batch_size_tokens, settings.steps
    return learning_rate(d_in, settings.d_sae, cell.target_l0, batch, steps)


def _train(
    cell: Cell, settings: SweepSettings, cache: ActivationCache, on_step: Callable[[], None]
) -> TrainedCell:
    memory = PeakMemory(settings.device)
    with memory.measured():
        sae = _untrained(cell, settings, cache)
        center = None if centers_itself(sae) else cache.mean(cell.hook)
        cfg = _trainer_config(cell, settings, cache, sae)
        with closing(_batches(cell, settings, cache)) as stream:
            run = train(sae, less(stream, center), cfg, on_step=on_step)
    return TrainedCell(sae.to("cpu"), center, run, memory.bytes)


def _train_together(
    cells: Sequence[Cell],
    settings: SweepSettings,
    cache: ActivationCache,
    on_step: Callable[[int], None],
) -> list[TrainedCell]:
    """Those of one seed read the same batches."""
    memory = PeakMemory(settings.device)
    with memory.measured(), ExitStack() as stack:
        saes = [_untrained(cell, settings, cache) for cell in cells]
        streams: dict[int, CacheBatches] = {}
        for cell in cells:
            if cell.seed not in streams:
                stream = _batches(cell, settings, cache)
                streams[cell.seed] = stack.enter_context(closing(stream))
        sources = [streams[cell.seed] for cell in cells]
        cfg = _trainer_config(cells[0], settings, cache, saes[0])
        runs = train_together(saes, sources, cfg, on_step=on_step)
    share = None if memory.bytes is None else memory.bytes // len(cells)
    pairs = zip(saes, runs, strict=True)
    return [TrainedCell(sae.to("cpu"), None, run, share) for sae, run in pairs]


def _untrained(cell: Cell, settings: SweepSettings, cache: ActivationCache) -> Any:
    torch.manual_seed(cell.seed)
    return ARCHITECTURES[cell.architecture](cache.width(cell.hook), settings.d_sae, cell.target_l0)


def _batches(cell: Cell, settings: SweepSettings, cache: ActivationCache) -> CacheBatches:
    return cache.batches(cell.hook, settings.train_batch_size_tokens, cell.seed)


def _trainer_config(
    cell: Cell, settings: SweepSettings, cache: ActivationCache, sae: Any
) -> SAETrainerConfig:
    lr = learning_rate_of(cell, settings, cache.width(cell.hook))
    batch, decay = settings.train_batch_size_tokens, lr_decay_fraction(sae)
    return trainer_config(settings.steps, batch, lr, settings.device, decay)
