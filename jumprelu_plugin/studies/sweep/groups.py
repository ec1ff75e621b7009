"""Which SAEs of a sweep are trained together: those that differ in L0 and seed alone, as memory
allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jumprelu_plugin.studies.sweep.architectures import PLUGIN
from jumprelu_plugin.studies.sweep.grid import Cell, SweepSettings
from jumprelu_plugin.studies.sweep.together import AHEAD
from jumprelu_plugin.training.health.machine import available, taken
from jumprelu_plugin.training.health.memory import (
    FLOAT32,
    KEPT_FOR_LOG,
    calibration_bytes,
    rows_bytes,
    step_bytes,
    usual_entries,
)

# Of the memory that is free when a group starts; the rest is for what a forecast does not know.
SHARE_OF_MEMORY = 0.7


def group_cells(cells: Sequence[Cell], settings: SweepSettings) -> list[list[Cell]]:
    """The cells in groups of at most `settings.train_together`, each where its first cell was.

    Only this package's SAEs on a CPU of several threads gain anything by it; every other cell is a
    group of its own.
    """
    shared = torch.device(settings.device).type == "cpu" and torch.get_num_threads() > 1
    groups: list[list[Cell]] = []
    open_groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if not shared or cell.architecture != PLUGIN:
            groups.append([cell])
            continue
        group = open_groups.get(cell.hook)
        if group is None or len(group) >= settings.train_together:
            group = open_groups[cell.hook] = []
            groups.append(group)
        group.append(cell)
    return groups


def largest_group(settings: SweepSettings, d_in: int, l0: float, threads: int) -> int:
    """How many SAEs fit into the memory that is free now; at least 1.

    Each keeps its weights and Adam's moments. Gradients and a step's temporaries exist once a
    thread; the first step of each, which calibrates, is taken alone.
    """
    device = torch.device(settings.device)
    room = available(device)
    if room is None:
        return settings.train_together
    free = SHARE_OF_MEMORY * (room - taken(device))
    most = 1
    while most < settings.train_together:
        needed = bytes_together(settings, d_in, l0, most + 1, min(threads, most + 1))
        if needed > free:
            break
        most += 1
    return most


def bytes_together(settings: SweepSettings, d_in: int, l0: float, saes: int, workers: int) -> int:
    """Memory of so many SAEs that train together, with so many steps at one time."""
    batch, d_sae = settings.train_batch_size_tokens, settings.d_sae
    weights = FLOAT32 * (2 * d_in * d_sae + 2 * d_sae + d_in)
    entries = usual_entries(batch, d_sae, l0)
    step = step_bytes(
        batch, d_in, d_sae, entries, "auto", settings.device, others=0, kept=KEPT_FOR_LOG
    )
    # Gradients, and one more copy of a matrix or two, as in the forecast of a run.
    a_worker = 2 * weights + step + rows_bytes(batch, d_in)
    batches = (AHEAD + 1) * FLOAT32 * batch * d_in
    calibration = calibration_bytes(batch, d_sae)
    return 3 * saes * weights + batches + max(workers * a_worker, calibration)
