"""What a latent's decoder direction says about the next token, read straight from the unembedding.

The direct effect alone (the "logit lens" of a direction): layers between the hook and the output
are skipped, so it is a hint for early hooks and close to the truth for late ones.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def logit_effects(
    model: Any, sae: Any, latent: int, count: int = 8
) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
    """The tokens whose logits W_dec[latent] @ W_U raises most, and by how much, descending.

    Only for dictionaries of the residual stream or of what is written to it (width d_model).

    Raises:
        ValueError: the decoder does not write vectors of the model's width.
    """
    direction = sae.W_dec[latent].detach().float()
    if direction.shape[0] != model.W_U.shape[0]:
        raise ValueError(
            f"the SAE's decoder writes {direction.shape[0]} values, the model's residual stream "
            f"has {model.W_U.shape[0]}: logit effects need an SAE of the residual stream, "
            "of hook_mlp_out or of hook_attn_out"
        )
    top = (direction @ model.W_U.float()).topk(count)
    return top.indices, top.values
