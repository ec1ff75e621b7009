"""What a latent's decoder direction says about the next token, read straight from the unembedding.

The direct effect alone (the "logit lens" of a direction): layers between the hook and the output
are skipped, so it is a hint for early hooks and close to the truth for late ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Latents at a time: 256 rows of Gemma 2's 256,000 logits take 0.26 GB.
_CHUNK = 256


@torch.no_grad()
def logit_effects(
    model: Any, sae: Any, latent: int, count: int = 8
) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
    """The tokens whose logits W_dec[latent] @ W_U raises most, and by how much, descending.

    Only for dictionaries of the residual stream or of what is written to it (width d_model).

    Raises:
        ValueError: the decoder does not write vectors of the model's width.
    """
    _require_residual_width(model, sae)
    top = (sae.W_dec[latent].detach().float() @ model.W_U.float()).topk(count)
    return top.indices, top.values


@dataclass(frozen=True)
class LogitEffects:
    """For every latent the tokens it raises and lowers most, strongest first, and by how much."""

    raised: Int[Tensor, "d_sae count"]
    raised_by: Float[Tensor, "d_sae count"]
    lowered: Int[Tensor, "d_sae count"]
    lowered_by: Float[Tensor, "d_sae count"]


@torch.no_grad()
def all_logit_effects(model: Any, sae: Any, count: int = 8) -> LogitEffects:
    """`logit_effects` of every latent, up and down, some latents at a time.

    Raises:
        ValueError: the decoder does not write vectors of the model's width.
    """
    _require_residual_width(model, sae)
    W_U = model.W_U.float()
    parts: list[tuple[Tensor, ...]] = []
    for rows in sae.W_dec.detach().float().split(_CHUNK):
        effects = rows @ W_U
        up, down = effects.topk(count), effects.topk(count, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _require_residual_width(model: Any, sae: Any) -> None:
    width, stream = sae.W_dec.shape[1], model.W_U.shape[0]
    if width != stream:
        raise ValueError(
            f"the SAE's decoder writes {width} values, the model's residual stream "
            f"has {stream}: logit effects need an SAE of the residual stream, "
            "of hook_mlp_out or of hook_attn_out"
        )
