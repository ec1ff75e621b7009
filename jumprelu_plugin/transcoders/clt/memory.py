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


def parameter_count(cfg: CLTConfig, shards: int = 1) -> int:
    """How many numbers a cross-layer transcoder has: of n layers, n(n + 1)/2 decoders.

    Args:
        shards: over which its latents are divided; the numbers are then of one of them.
    """
    held = cfg.d_sae // shards
    own = held * (cfg.d_in + 2) + cfg.d_out
    return cfg.n_layers * own + decoder_count(cfg) * held * cfg.d_out


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
    replicas: int = 1,
    shards: int = 1,
) -> MemoryEstimate:
    """Add up a run. `transcoders` holds all gradients here: there is one backward pass for all.

    Args:
        sequences_per_pass: in a forward pass of the model, of all processes.
        target_l0, step_kernel: as in the training's config.
        replicas, shards: over which processes split each batch, and the latents; the estimate is
            then of the first, which joins the whole to save it.
    """
    widths = [cfg.d_in, cfg.d_out] * cfg.n_layers
    width = sum(widths)
    held, tokens, processes = cfg.d_sae // shards, batch_tokens // replicas, replicas * shards
    own = FLOAT32 * parameter_count(cfg, shards)
    step = step_bytes(
        tokens,
        cfg.d_in,
        held,
        usual_entries(batch_tokens, cfg.d_sae, target_l0) / shards,
        step_kernel,
        torch.device(device).type,
        others=cfg.n_layers - 1,
        kept=KEPT_FOR_BACKWARD,
        arrays=STEP_ARRAYS_CLT,
    )
    # What each layer writes, and its gradient, which live until the backward pass.
    written = 2 * FLOAT32 * tokens * decoder_count(cfg) * cfg.d_out
    # Weights and both moments, in the memory of the first process's host.
    joined = 3 * FLOAT32 * parameter_count(cfg)
    joins_here = processes > 1 and torch.device(device).type == "cpu"
    return MemoryEstimate(
        model=parameter_bytes(model),
        transcoders=4 * own,
        chunk=FLOAT32 * chunk_sequences * context_size * width,
        working=max(
            step + written,
            # Before the first step there are no gradients or moments.
            calibration_bytes(batch_tokens, held, transcoder=True) - 3 * own,
            forward_bytes(model, width, context_size, -(-sequences_per_pass // processes))
            + FLOAT32 * sequences_per_pass * context_size * width,
            joined if joins_here else 0,
        )
        + rows_bytes(batch_tokens, width),
    )


def decoder_count(cfg: CLTConfig) -> int:
    """How many decoders it has: one from each layer to itself and to every later one."""
    return cfg.n_layers * (cfg.n_layers + 1) // 2
