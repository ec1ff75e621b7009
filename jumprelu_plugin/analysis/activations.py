"""A dictionary's activations over a text, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, sae_sites
from jumprelu_plugin.models.trained_on import excluded_tokens, sae_heads, trained_positions


def latent_activations(
    model: Any, sae: Any, tokens: Int[Tensor, "sequences positions"], batch_size: int
) -> Iterator[tuple[int, Float[Tensor, "batch_positions d_sae"]]]:
    """Run the model and yield, for each batch, its start in the flattened text and its activations.

    Activations are float32 and on the CPU, with one row for each position of the batch.

    Args:
        model: a hooked model.
        sae: the dictionary; its metadata names the hook.
        tokens: the text, on any device.
        batch_size: sequences in a batch.

    Raises:
        ValueError: the SAE has no hook name, or the model has no such hook, or it does not fire.
    """
    hook, _ = sae_sites(sae)
    head, _ = sae_heads(sae)
    require_firing(model, hook)
    inputs: list[Tensor] = []
    for start in range(0, len(tokens), batch_size):
        inputs.clear()
        with attached(model, hook, lambda x: inputs.append(flat_heads(x, head))), torch.no_grad():
            model(tokens[start : start + batch_size].to(model.cfg.device), return_type=None)
        with flat_input(sae), torch.no_grad():
            x = inputs[0].flatten(0, 1).to(sae.W_dec.device, sae.dtype)
            acts = sae.encode(x).float().cpu()
        yield start * tokens.shape[1], acts


def left_out(
    sae: Any, tokens: Int[Tensor, "sequences positions"], special_token_ids: Iterable[int]
) -> Bool[Tensor, " tokens"]:
    """Which tokens of the flattened text are not counted, on the CPU.

    These are special tokens, and what the SAE was not trained on: tokens that its metadata excludes
    and positions outside its slice.

    Raises:
        ValueError: the metadata's `seqpos_slice` is no slice.
    """
    tokens = tokens.cpu()
    ids = sorted({*special_token_ids, *excluded_tokens(sae)})
    outside = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype))
    inside = torch.zeros_like(outside)
    inside[:, trained_positions(sae)] = True
    return (outside | ~inside).flatten()
