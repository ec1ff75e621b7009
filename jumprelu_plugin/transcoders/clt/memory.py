"""The memory that a training of a cross-layer transcoder takes, from its sizes alone."""

from __future__ import annotations

from typing import Any

import torch

from jumprelu_plugin.training.health.memory import (
    FLOAT32,
    KEPT_FOR_BACKWARD,
    STEP_ARRAYS_CLT,
    calibration_bytes,
    forward_bytes,
    parameter_bytes,
    rows_bytes,
    step_bytes,
    usual_entries,
)
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.memory import MemoryEstimate


def parameter_count(cfg: CLTConfig) -> int:
    """How many numbers a cross-layer transcoder has: of n layers, n(n + 1)/2 decoders."""
    own = cfg.d_sae * (cfg.d_in + 2) + cfg.d_out
    return cfg.n_layers * own + _decoders(cfg) * cfg.d_sae * cfg.d_out


def estimate_memory(
    model: Any,
    cfg: CLTConfig,
    *,
    batch_tokens: int,
    context_size: int,
    sequences_per_pass: int,
    chunk_sequences: int,
    target_l0: float | None,
    step_kernel: str,
    device: str = "cpu",
) -> MemoryEstimate:
    """Add up a run. `transcoders` holds all gradients here: there is one backward pass for all.

    Args:
        sequences_per_pass: in a forward pass of the model.
        target_l0, step_kernel: as in the training's config.
    """
    widths = [cfg.d_in, cfg.d_out] * cfg.n_layers
    width = sum(widths)
    step = step_bytes(
        batch_tokens,
        cfg.d_in,
        cfg.d_sae,
        usual_entries(batch_tokens, cfg.d_sae, target_l0),
        step_kernel,
        torch.device(device).type,
        others=cfg.n_layers - 1,
        kept=KEPT_FOR_BACKWARD,
        arrays=STEP_ARRAYS_CLT,
    )
    # What each layer writes, and its gradient, which live until the backward pass.
    written = 2 * FLOAT32 * batch_tokens * _decoders(cfg) * cfg.d_out
    return MemoryEstimate(
        model=parameter_bytes(model),
        transcoders=4 * FLOAT32 * parameter_count(cfg),
        chunk=FLOAT32 * chunk_sequences * context_size * width,
        working=max(
            step + written,
            # Before the first step there are no gradients or moments.
            calibration_bytes(batch_tokens, cfg.d_sae, transcoder=True)
            - 3 * FLOAT32 * parameter_count(cfg),
            forward_bytes(model, width, context_size, sequences_per_pass)
            + FLOAT32 * sequences_per_pass * context_size * width,
        )
        + rows_bytes(batch_tokens, width),
    )


def _decoders(cfg: CLTConfig) -> int:
    return cfg.n_layers * (cfg.n_layers + 1) // 2
