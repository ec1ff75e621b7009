"""What a latent's decoder direction says about the next token, read straight from the unembedding.

The direct effect alone (the "logit lens" of a direction): layers between the hook and the output
are skipped, so it is a hint for early hooks and close to the truth for late ones. What the final
norm does to every direction alike, its gain and a LayerNorm's centring, is part of it; the token's
own norm, by which it divides, is not.
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
    """The tokens whose logits W_dec[latent] raises most, and by how much, descending.

    By how much where the final norm divides by 1. Only for dictionaries of the residual stream or
    of what is written to it (width d_model).

    Raises:
        ValueError: the decoder does not write vectors of the model's width.
    """
    _require_residual_width(model, sae)
    top = (_normed(model, sae.W_dec[latent].detach().float()) @ model.W_U.float()).topk(count)
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
        effects = _normed(model, rows) @ W_U
        up, down = effects.topk(count), effects.topk(count, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _normed(model: Any, directions: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Directions of the residual stream as the final norm passes them on, up to its division.

    Measured on the norm itself, since models differ in how they store its gain (Gemma as gain - 1)
    and in whether it was folded into W_U.
    """
    width = model.W_U.shape[0]
    signs = torch.ones(1, 1, width, dtype=model.W_U.dtype, device=model.W_U.device)
    signs[..., 1::2] = -1
    probe = signs - signs.mean()
    # A bias is in both.
    odd_part = 0.5 * (model.ln_final(probe) - model.ln_final(-probe))
    gain = (odd_part * probe.square().mean().sqrt() / probe).float().flatten()
    centres = torch.allclose(model.ln_final(probe + 1), model.ln_final(probe), 1e-2, 1e-2)
    if centres:
        directions = directions - directions.mean(-1, keepdim=True)
    return directions * gain


def _require_residual_width(model: Any, sae: Any) -> None:
    width, stream = sae.W_dec.shape[1], model.W_U.shape[0]
    if width != stream:
        raise ValueError(
            f"the SAE's decoder writes {width} values, the model's residual stream "
            f"has {stream}: logit effects need an SAE of the residual stream, "
            "of hook_mlp_out or of hook_attn_out"
        )
