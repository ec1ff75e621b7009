"""What a training of a cross-layer transcoder takes in memory, from its sizes alone."""

from __future__ import annotations

from typing import Any

from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.memory import (
    DENSE_ARRAYS,
    FLOAT32,
    MemoryEstimate,
    forward_numbers,
)


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
) -> MemoryEstimate:
    """Add up a run. `transcoders` holds all gradients here: there is one backward pass for all."""
    widths = [cfg.d_in, cfg.d_out] * cfg.n_layers
    # All layers' arrays live until the backward pass, and what each has written does too.
    latents = DENSE_ARRAYS * cfg.n_layers * cfg.d_sae
    written = 2 * _decoders(cfg) * cfg.d_out + 2 * sum(widths)
    return MemoryEstimate(
        model=sum(p.numel() * p.element_size() for p in model.parameters()),
        transcoders=4 * FLOAT32 * parameter_count(cfg),
        chunk=FLOAT32 * chunk_sequences * context_size * sum(widths),
        working=FLOAT32
        * max(
            batch_tokens * (latents + written),
            forward_numbers(model, widths, context_size, sequences_per_pass),
        ),
    )


def _decoders(cfg: CLTConfig) -> int:
    return cfg.n_layers * (cfg.n_layers + 1) // 2
