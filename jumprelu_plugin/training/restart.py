"""Dead latents, started again where the reconstruction is worst.

A latent that never fires has no gradient from the reconstruction, and none from the estimators once
its pre-activations stay below its window. It is given a new direction: the residual of a token the
dictionary rebuilds badly, drawn in proportion to the squared error (as in Anthropic, "Towards
Monosemanticity", 2023, appendix on neuron resampling). Its encoder points the same way with the
length that living encoders have, its threshold is their median, and the optimiser forgets what it
had gathered about it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from jumprelu_plugin.training.units import set_value, stored

# A latent at the average rate L0/d_sae misses this many firings in a row with a chance of e^-200.
PATIENCE_IN_FIRINGS = 200
# Shorter than this, and a latent has not had the time to learn.
SHORTEST_PATIENCE = 50


def patience(d_sae: int, target_l0: float, batch: int) -> int:
    """Steps without firing after which a latent counts as dead: at the mean rate it would have
    fired 200 times, and at least 50 steps."""
    return max(SHORTEST_PATIENCE, round(PATIENCE_IN_FIRINGS * d_sae / (target_l0 * batch)))


class FiringRecord:
    """How long each latent has been silent.

    Attributes:
        silent: steps since each latent fired, [d_sae].
        steps: steps seen.
        checked: the step at which dead latents were last looked for.
        peak_rate: the highest learning rate seen.
    """

    def __init__(self, d_sae: int):
        self.silent: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self.steps = self.checked = 0
        self.peak_rate = 0.0

    def due(self, patience: int) -> bool:
        """Whether dead latents are to be looked for after this step."""
        return self.steps - self.checked >= patience

    def update(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Take in one batch's activations, dense or sparse COO of the active ones."""
        self.steps += 1
        self.silent = self.silent.to(feature_acts.device) + 1
        if feature_acts.is_sparse:
            self.silent.index_fill_(0, feature_acts._indices()[1], 0)
        else:
            self.silent.masked_fill_((feature_acts > 0).any(0), 0)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside `silent`."""
        return {"steps": self.steps, "checked": self.checked, "peak_rate": self.peak_rate}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps, self.checked = state["steps"], state["checked"]
        self.peak_rate = state["peak_rate"]


@torch.no_grad()
def draw(
    dead: Bool[Tensor, " d_sae"], residual: Float[Tensor, "batch d_out"], seed: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Dead latents and, for each, the token it is to start from.

    No more latents are drawn than the batch has tokens with an error, and no token twice. `seed`
    alone decides, on every device: a resumed run draws what the uninterrupted one draws.
    """
    random = torch.Generator().manual_seed(seed)
    latents = dead.nonzero().flatten()
    error = residual.square().sum(1).cpu()
    count = min(len(latents), int((error > 0).sum()))
    chosen = torch.randperm(len(latents), generator=random)[:count]
    tokens = torch.multinomial(error, count, generator=random) if count else chosen
    return latents[chosen.to(latents.device)], tokens.to(latents.device)


@torch.no_grad()
def restart_(
    sae: nn.Module,
    latents: Int[Tensor, " n"],
    encoders: Float[Tensor, "n d_in"],
    decoders: Float[Tensor, "n d_out"],
    centre: Float[Tensor, " d_in"],
    living: Bool[Tensor, " d_sae"],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Give latents new directions (of any length), and all else as the living latents have it.

    Args:
        sae: has W_enc, b_enc, W_dec and threshold, plain or parametrized (`training.units`).
        centre: the encoder's input that gives the restarted latents z = 0.
        living: latents to take norms and the threshold from; all of them if none is alive.
        optimizer: Adam's moments for these latents are set to 0. None: there is none yet.
    """
    if not len(latents):
        return
    if not living.any():
        living = torch.ones_like(living)
    W_enc, W_dec = (getattr(sae, name).data for name in ("W_enc", "W_dec"))
    threshold, b_enc = (getattr(sae, name).detach().clone() for name in ("threshold", "b_enc"))
    encoder_norm = W_enc[:, living].norm(dim=0).mean()
    decoder_norm = W_dec[living].norm(dim=1).mean()
    encoders = (encoder_norm * functional.normalize(encoders, dim=1)).to(W_enc.dtype)
    W_enc[:, latents] = encoders.t()
    W_dec[latents] = (decoder_norm * functional.normalize(decoders, dim=1)).to(W_dec.dtype)
    threshold[latents] = threshold[living].median()
    b_enc[latents] = -(encoders @ centre.to(W_enc.dtype)).to(b_enc.dtype)
    set_value(sae, "threshold", threshold)
    set_value(sae, "b_enc", b_enc)
    if optimizer is None:
        return
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("threshold", 0), ("b_enc", 0)):
        moments = optimizer.state.get(stored(sae, name), {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                moments[moment].index_fill_(axis, latents, 0.0)
