"""Activations of a hook as one tensor, and a dictionary's metrics on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.evaluation.metrics import Metrics, StreamingMetrics
from jumprelu_plugin.evaluation.splicing import evaluated_positions
from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input

_TOKENS_PER_ENCODE = 4096


@torch.no_grad()
def harvest_activations(
    model: Any,
    hook: str,
    tokens: Int[Tensor, "sequences positions"],
    *,
    special_token_ids: Iterable[int] = (),
    positions: slice | Sequence[int | None] = slice(None),
    head: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Float[Tensor, "tokens d"]:
    """Activations at a hook without those at special tokens, in random order, on the CPU.

    Args:
        model: a hooked model.
        hook: name of the hook; head axes are flattened, unless `head` names one.
        tokens: the text.
        special_token_ids: tokens to leave out.
        positions: the positions to keep, as a slice or as SAELens' `seqpos_slice`: start, stop and
            step.
        head: the only head to keep; None for all.
        batch_size: sequences in a batch.
        seed: seed of the random order.

    Raises:
        ValueError: the model has no such hook, the hook does not fire, or all tokens are special.
    """
    require_firing(model, hook)
    if not isinstance(positions, slice):
        positions = slice(*positions)
    parts: list[Tensor] = []
    special = sorted(set(special_token_ids))
    for text in tokens.to(model.cfg.device).split(batch_size):
        kept = evaluated_positions(text, special, [positions])

        def store(activation: Tensor, kept: Tensor = kept) -> None:
            parts.append(flat_heads(activation, head)[kept.to(activation.device)].cpu())

        with attached(model, hook, store):
            model(text, return_type=None)
    activations = torch.cat(parts)
    if not len(activations):
        raise ValueError(f"all {tokens.numel()} tokens are special, so there are no activations")
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(seed))
    return activations[order]


@torch.no_grad()
def evaluate_on_activations(sae: Any, activations: Float[Tensor, "tokens d_in"]) -> Metrics:
    """L0, FVU and firing of an SAE on raw activations."""
    metrics = StreamingMetrics()
    with flat_input(sae):
        for x in activations.split(_TOKENS_PER_ENCODE):
            x = x.float()
            acts = sae.encode(x)
            metrics.update(x, sae.decode(acts), acts)
    return metrics.compute()
