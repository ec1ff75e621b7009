"""What a training of many transcoders takes in memory, from its sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FLOAT32 = 4
# Arrays [batch, d_sae] that exist together at the widest point of a dense step (pre-activations,
# activations, gates, the window, gradients), which the choice of path may try at any time.
_DENSE_ARRAYS = 6


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak, beside what Python and PyTorch take themselves.

    Attributes:
        model: the language model's weights.
        transcoders: weights and both moments of Adam of all, and the gradients of one.
        chunk: activations that are shuffled together.
        working: the larger of a training step's and a forward pass's temporaries.
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
    step = _DENSE_ARRAYS * batch_tokens * max(cfg.d_sae for cfg in configs)
    tokens = sequences_per_pass * context_size
    # What is harvested, a block's own activations, and attention scores with their softmax.
    a_block = 3 * model.cfg.d_mlp + 8 * model.cfg.d_model + 3 * model.cfg.n_heads * context_size
    forward = tokens * (sum(hook_widths) + a_block)
    return MemoryEstimate(
        model=sum(p.numel() * p.element_size() for p in model.parameters()),
        transcoders=_FLOAT32 * (3 * sum(weights) + max(weights)),
        chunk=_FLOAT32 * chunk_sequences * context_size * sum(hook_widths),
        working=_FLOAT32 * max(step, forward),
    )
