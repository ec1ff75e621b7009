"""The memory that a training of several transcoders takes, from its sizes alone.

The arithmetic of a step and a forward pass is `training.health.memory`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jumprelu_plugin.training.health.memory import (
    FLOAT32,
    KEPT_FOR_LOG,
    calibration_bytes,
    forward_bytes,
    parameter_bytes,
    rows_bytes,
    step_bytes,
    usual_entries,
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak, beside what Python and PyTorch take themselves.

    Attributes:
        model: the language model's weights.
        transcoders: weights and both moments of Adam of all, and the gradients of one.
        chunk: activations that are shuffled together.
        working: temporaries of a step, of the calibration before the first, or of a forward pass,
            whichever takes most.
    """

    model: int
    transcoders: int
    chunk: int
    working: int

    @property
    def total(self) -> int:
        return self.model + self.transcoders + self.chunk + self.working

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(self).items())
        return f"{self.total / 1e9:.2f} GB ({parts})"


def transcoder_parameters(cfg: Any) -> int:
    """How many numbers a transcoder of this config has."""
    d_in, d_sae, d_out = cfg.d_in, cfg.d_sae, cfg.width_out
    skip = d_in * d_out if cfg.architecture() == "jumprelu_skip_transcoder" else 0
    return d_sae * (d_in + d_out + 2) + d_out + skip


def estimate_memory(
    model: Any,
    configs: Sequence[Any],
    *,
    hook_widths: Sequence[int],
    batch_tokens: int,
    context_size: int,
    sequences_per_pass: int,
    chunk_sequences: int,
) -> MemoryEstimate:
    """Add up a run.

    Args:
        configs: of the transcoders.
        hook_widths: of every hook that is harvested.
        sequences_per_pass: in a forward pass of the model.
    """
    weights = [transcoder_parameters(cfg) for cfg in configs]
    width = sum(hook_widths)
    return MemoryEstimate(
        model=parameter_bytes(model),
        transcoders=FLOAT32 * (3 * sum(weights) + max(weights)),
        chunk=FLOAT32 * chunk_sequences * context_size * width,
        working=max(
            *(_step_bytes(cfg, batch_tokens, others=len(configs) - 1) for cfg in configs),
            forward_bytes(model, width, context_size, sequences_per_pass)
            + FLOAT32 * sequences_per_pass * context_size * width,
        )
        + rows_bytes(batch_tokens, width),
    )


def _step_bytes(cfg: Any, batch: int, others: int) -> int:
    entries = usual_entries(batch, cfg.d_sae, cfg.target_l0)
    step = step_bytes(
        batch,
        cfg.d_in,
        cfg.d_sae,
        entries,
        cfg.step_kernel,
        torch.device(cfg.device).type,
        others=others,
        kept=KEPT_FOR_LOG,
    )
    return max(step, calibration_bytes(batch, cfg.d_sae, transcoder=True))


def fitting_chunk(
    estimate: Callable[[int], MemoryEstimate], wanted: int, smallest: int, memory_gb: float | None
) -> tuple[int, MemoryEstimate]:
    """The chunk of sequences, `wanted` or what fits into `memory_gb`, and what the run takes.

    Raises:
        ValueError: not even the smallest fits.
    """
    chunk = max(wanted, smallest)
    found = estimate(chunk)
    while memory_gb is not None and found.total > memory_gb * 1e9 and chunk > smallest:
        chunk = max(smallest, chunk // 2)
        found = estimate(chunk)
    if memory_gb is not None and found.total > memory_gb * 1e9:
        raise ValueError(
            f"the run takes {found}, more than memory_gb={memory_gb:g}, with the smallest "
            "chunk there is: lower d_sae, train fewer layers at a time, or lower "
            "train_batch_size_tokens"
        )
    return chunk, found


def smallest_chunk(batch_tokens: int, context_size: int, sequences_per_pass: int) -> int:
    """Sequences in whole forward passes that hold two batches."""
    return sequences_per_pass * -(-2 * batch_tokens // (sequences_per_pass * context_size))
