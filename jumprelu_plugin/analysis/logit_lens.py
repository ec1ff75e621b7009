"""A latent's direct effect on the logits: its decoder row times the unembedding ("logit lens").

The layers between the hook and the output are skipped, so the effect approximates the true one
well at late hooks and poorly at early ones. It includes the final norm's gain and a LayerNorm's
centering, which act alike on every token, and not the division by the token's norm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.models.hooks import sae_sites

# Hooks whose values are, or are added to, the residual stream, which the unembedding reads. A
# bridge's own names of the stream are the last two.
_RESIDUAL = re.compile(
    r"(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_mlp_out|hook_attn_out|hook_embed"
    r"|blocks\.\d+\.hook_in|blocks\.\d+\.hook_out)$"
)
# Latents at a time: 256 rows of Gemma 2's 256,000 logits take 0.26 GB.
_CHUNK = 256


@torch.no_grad()
def logit_effects(
    model: Any, sae: Any, latent: int, count: int = 8
) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
    """The tokens whose logits W_dec[latent] raises most, and the amounts, descending.

    The amounts hold for a token that the final norm divides by 1. The dictionary must write to the
    residual stream, or to a hook whose values are added to it.

    Raises:
        ValueError: it writes elsewhere, to a hook of another width, or its hook is not known.
    """
    _require_residual(model, sae)
    top = (_normed(model, sae.W_dec[latent].detach().float()) @ model.W_U.float()).topk(count)
    return top.indices, top.values


@dataclass(frozen=True)
class LogitEffects:
    """The tokens whose logits each latent raises and lowers most.

    Attributes:
        raised, lowered: token ids, [d_sae, count], largest change first.
        raised_by, lowered_by: the changes of their logits, [d_sae, count].
    """

    raised: Int[Tensor, "d_sae count"]
    raised_by: Float[Tensor, "d_sae count"]
    lowered: Int[Tensor, "d_sae count"]
    lowered_by: Float[Tensor, "d_sae count"]


@torch.no_grad()
def all_logit_effects(model: Any, sae: Any, count: int = 8) -> LogitEffects:
    """`logit_effects` of every latent, raised and lowered, computed in chunks of latents.

    Raises:
        ValueError: as `logit_effects`.
    """
    _require_residual(model, sae)
    W_U = model.W_U.float()
    parts: list[tuple[Tensor, ...]] = []
    for rows in sae.W_dec.detach().float().split(_CHUNK):
        effects = _normed(model, rows) @ W_U
        up, down = effects.topk(count), effects.topk(count, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _normed(model: Any, directions: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Directions after the final norm's gain and centering, without its division.

    The gain is measured by calling the norm, because models differ in how they store it (Gemma
    stores gain - 1) and in whether it is folded into W_U.
    """
    width = model.W_U.shape[0]
    signs = torch.ones(1, 1, width, dtype=model.W_U.dtype, device=model.W_U.device)
    signs[..., 1::2] = -1
    probe = signs - signs.mean()
    # The difference cancels a bias.
    odd_part = 0.5 * (model.ln_final(probe) - model.ln_final(-probe))
    gain = (odd_part * probe.square().mean().sqrt() / probe).float().flatten()
    centers = torch.allclose(model.ln_final(probe + 1), model.ln_final(probe), 1e-2, 1e-2)
    if centers:
        directions = directions - directions.mean(-1, keepdim=True)
    return directions * gain


def writes_to_residual(sae: Any) -> bool:
    """Whether an SAE writes to the residual stream, or to a hook whose values are added to it.

    Raises:
        ValueError: its hook is not known.
    """
    return _RESIDUAL.search(sae_sites(sae)[1]) is not None


def _require_residual(model: Any, sae: Any) -> None:
    width, stream = sae.W_dec.shape[1], model.W_U.shape[0]
    if not writes_to_residual(sae) or width != stream:
        raise ValueError(
            f"the SAE's decoder writes {width} values at {sae_sites(sae)[1]}, the model's residual "
            f"stream has {stream}: logit effects need an SAE of the residual stream, "
            "of hook_mlp_out or of hook_attn_out"
        )
