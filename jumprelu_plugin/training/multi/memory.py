"""The most memory a run over several dictionaries takes (`health.memory` has the counts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jumprelu_plugin.training.health.memory import (
    BUFFER_COPIES,
    KEPT_FOR_LOG,
    MemoryForecast,
    at_its_peak,
    calibration_bytes,
    harvest_bytes,
    parameter_bytes,
    rows_bytes,
    step_bytes,
    usual_entries,
)


def forecast_of_all(
    cfg: Any,
    saes: Mapping[str, Any],
    model: Any,
    entries: Mapping[str, float],
    widths: Mapping[str, int],
    *,
    calibrates: bool,
    saves_buffer: bool = False,
) -> MemoryForecast:
    """Memory on the device of the dictionaries, which take their steps one after the other.

    Args:
        cfg: of the run.
        saes: by name, made and on the device.
        entries: by name, pairs a token that the sparse step keeps; what is usual where missing.
        widths: of the activations at every hook.
        calibrates: whether the first step measures z first.
        saves_buffer: whether checkpoints hold the mixing buffer.
    """
    device, batch = torch.device(cfg.device), cfg.train_batch_size_tokens
    width = sum(widths.values())
    buffer, forward, one_pass = harvest_bytes(cfg, model, width)
    weights = {name: parameter_bytes(sae) for name, sae in saes.items()}
    alone = {name: _step(name, sae, batch, device, entries, 0) for name, sae in saes.items()}
    kept = sum(
        _step(name, sae, batch, device, entries, 1) - alone[name] for name, sae in saes.items()
    )
    total = sum(weights.values())
    moments = {
        "step": kept
        + max(alone[name] + weights[name] for name in saes)
        + 2 * rows_bytes(batch, width),  # all hooks', and the copies taken apart
        "calibration": calibrates
        # A dictionary is calibrated before it has gradients, maybe after the others' first steps.
        * max(
            calibration_bytes(batch, sae.cfg.d_sae) - 3 * weights[name]
            for name, sae in saes.items()
        ),
        "drawing": max(int((BUFFER_COPIES - 1) * buffer), forward) + one_pass - total,
        "saving": buffer if saves_buffer and cfg.checkpoint_path is not None else 0,
    }
    return at_its_peak(device, total, buffer, moments)


def _step(
    name: str,
    sae: Any,
    batch: int,
    device: torch.device,
    entries: Mapping[str, float],
    others: int,
) -> int:
    target = getattr(sae.cfg, "target_l0", None)
    return step_bytes(
        batch,
        sae.cfg.d_in,
        sae.cfg.d_sae,
        entries.get(name, usual_entries(batch, sae.cfg.d_sae, target)),
        getattr(sae.cfg, "step_kernel", "dense"),
        device.type,
        others=others,
        kept=KEPT_FOR_LOG,
    )
