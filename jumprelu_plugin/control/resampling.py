"""Dead latents, started again where the reconstruction is worst.

A latent that never fires has no gradient from the reconstruction, and none from the estimators once
its pre-activations stay below its window. It is given a new direction: the residual of a token the
dictionary rebuilds badly, drawn in proportion to the squared error (as in Anthropic, "Towards
Monosemanticity", 2023, appendix on neuron resampling). Its encoder points the same way.

How it starts decides whether it lives (docs/results.md has the measurements). An encoder as long as
the living ones' gives activations that overshoot the residual; a threshold as high as theirs leaves
it firing too rarely to learn. And Adam divides a step by the root of its second moment: with that
set to zero, the first steps are several times the learning rate whatever the gradient, and throw
the new direction away. It is set to what the living latents have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from jumprelu_plugin.control.units import set_value, stored

# A latent at the average rate L0/d_sae misses this many firings in a row with a chance of e^-50.
PATIENCE_IN_FIRINGS = 50
# In steps. Shorter, and a latent has not had the time to learn.
SHORTEST_PATIENCE = 12
# A latent that fails does so soon. One that has fired for long and falls silent is rare and rests:
# it may be silent for a tenth of its life, up to four times the patience with a new one.
REST = 0.1
LONGEST_REST = 4
# No restart below this share of the highest learning rate: the latent could no longer learn, and
# its firings count against the L0 that the others need (docs/results.md).
RESAMPLE_ABOVE_LR = 0.1
# Tokens looked at for each that is taken, and the exponent of `unexplained` in the choice.
CANDIDATES = 4
PREFERENCE_FOR_NEW = 6
# Of `unexplained`'s product, at one time.
PRODUCT_BYTES = 2**23
# Of the living encoders' mean length, and of the living latents' median threshold.
ENCODER_SHARE = 0.6
THRESHOLD_SHARE = 0.75


def patience(d_sae: int, target_l0: float, batch: int) -> int:
    """Steps without firing after which a new latent counts as dead: at the mean rate it would have
    fired 50 times, and at least 12 steps."""
    return max(SHORTEST_PATIENCE, round(PATIENCE_IN_FIRINGS * d_sae / (target_l0 * batch)))


def longest_patience(d_sae: int, target_l0: float, batch: int) -> int:
    """Steps without firing after which any latent counts as dead, however long it has lived."""
    return LONGEST_REST * patience(d_sae, target_l0, batch)


# (inputs, residual, tokens) -> (new encoders, the input that gives them z = 0)
Aim = Callable[
    [Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"], Int[Tensor, " n"]],
    tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]],
]


class FiringRecord:
    """How long each latent has been silent, and whether that is long for it.

    Attributes:
        silent: steps since each latent fired, [d_sae].
        lived: steps since each latent started, or started again, [d_sae].
        steps: steps seen.
        checked: the step at which dead latents were last looked for.
        peak_rate: the highest learning rate seen.
    """

    def __init__(self, d_sae: int):
        self.silent: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self.lived: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self.steps = self.checked = 0
        self.peak_rate = 0.0

    def due(self, patience: int) -> bool:
        """Whether dead latents are to be looked for after this step."""
        return self.steps - self.checked >= patience

    def update(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Take in one batch's activations, dense or sparse COO of the active ones."""
        self.steps += 1
        self.silent = self.silent.to(feature_acts.device) + 1
        self.lived = self.lived.to(feature_acts.device) + 1
        if feature_acts.is_sparse:
            self.silent.index_fill_(0, feature_acts._indices()[1], 0)
        else:
            self.silent.masked_fill_((feature_acts > 0).any(0), 0)

    def dead(self, patience: int) -> Bool[Tensor, " d_sae"]:
        """Latents silent for too long, where a new one is given `patience` steps."""
        allowed = (REST * self.lived).clamp(patience, LONGEST_REST * patience)
        return self.silent >= allowed

    def may_resample(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the learning rate is still high enough for a latent to learn anything."""
        rate = max(group["lr"] for group in optimizer.param_groups)
        self.peak_rate = max(self.peak_rate, rate)
        return rate >= RESAMPLE_ABOVE_LR * self.peak_rate

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside `tensors`."""
        return {"steps": self.steps, "checked": self.checked, "peak_rate": self.peak_rate}

    def tensors(self) -> dict[str, Int[Tensor, " d_sae"]]:
        return {"silent": self.silent, "lived": self.lived}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.steps, self.checked = state["steps"], state["checked"]
        self.peak_rate = state["peak_rate"]
        self.silent, self.lived = tensors["silent"], tensors["lived"]


@torch.no_grad()
def draw(
    dead: Bool[Tensor, " d_sae"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    seed: int,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Dead latents and, for each, the token it is to start from.

    Tokens are drawn in proportion to their squared error, several for each latent, and among these
    the ones whose residual no living latent points along: what a known latent left out because it
    stayed below its threshold needs no second latent.

    No more latents are drawn than the batch has tokens with an error, and no token twice. `seed`
    alone decides, on every device: a resumed run draws what the uninterrupted one draws.
    """
    random = torch.Generator().manual_seed(seed)
    latents = dead.nonzero().flatten()
    error = residual.square().sum(1).cpu()
    wrong = int((error > 0).sum())
    count = min(len(latents), wrong)
    chosen = torch.randperm(len(latents), generator=random)[:count]
    if not count:
        return latents[:0], latents[:0]
    tokens = torch.multinomial(error, min(CANDIDATES * count, wrong), generator=random)
    new = unexplained(residual[tokens.to(residual.device)], W_dec, ~dead).cpu()
    # Nothing is ruled out: a residual along a living latent is drawn when there is no other.
    weight = new.pow(PREFERENCE_FOR_NEW).clamp_min(1e-30)
    tokens = tokens[torch.multinomial(weight, count, generator=random)]
    return latents[chosen.to(latents.device)], tokens.to(latents.device)


def unexplained(
    vectors: Float[Tensor, "n d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    living: Bool[Tensor, " d_sae"],
) -> Float[Tensor, " n"]:
    """The share of each vector's squared length that its best living latent would leave."""
    unit = functional.normalize(vectors, dim=1)
    best = unit.new_zeros(len(unit))
    rows = max(1, PRODUCT_BYTES // (4 * len(unit)))
    for start in range(0, len(W_dec), rows):
        piece = slice(start, start + rows)
        directions = functional.normalize(W_dec[piece][living[piece]].to(unit.dtype), dim=1)
        if len(directions):
            best = torch.maximum(best, (unit @ directions.t()).amax(1))
    return 1 - best.clamp(0, 1).square()


@torch.no_grad()
def resample_dead_(
    sae: nn.Module,
    firing: FiringRecord,
    patience: int,
    inputs: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    aim: Aim,
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> None:
    """Look for dead latents and start each again where the residual of a batch is large.

    Args:
        sae: as for `resample_`.
        patience: steps of silence that a new latent is allowed.
        inputs, residual: of one batch.
        aim: given inputs, residual and the tokens drawn, the new encoders and their center.
        seed: of the draw; another for each layer, or all would start from the same tokens.
    """
    firing.checked = firing.steps
    dead = firing.dead(patience)
    latents, tokens = draw(dead, residual, sae.W_dec, seed)  # type: ignore[arg-type]
    encoders, center = aim(inputs, residual, tokens)
    resample_(sae, latents, encoders, residual[tokens], center, ~dead, optimizer)
    firing.silent[latents] = firing.lived[latents] = 0


def unusual_inputs(
    inputs: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    tokens: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]]:
    """A transcoder's `Aim`: its residual lies in the output's space, so its encoders look for what
    is unusual in these tokens' inputs."""
    mean = inputs.mean(0)
    return inputs[tokens] - mean, mean


@torch.no_grad()
def resample_(
    sae: nn.Module,
    latents: Int[Tensor, " n"],
    encoders: Float[Tensor, "n d_in"],
    decoders: Float[Tensor, "n d_out"],
    center: Float[Tensor, " d_in"],
    living: Bool[Tensor, " d_sae"],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Give latents new directions (of any length), and a start that the living latents measure.

    Args:
        sae: has W_enc, b_enc, W_dec and threshold, plain or parametrized (`control.units`).
        center: the encoder's input that gives the restarted latents z = 0.
        living: latents to measure norms, threshold and Adam's second moment on; all of them if
            none is alive.
        optimizer: Adam's first moment for these latents is set to 0, the second to the living
            latents' mean. None: there is none yet.
    """
    if not len(latents):
        return
    if not living.any():
        living = torch.ones_like(living)
    W_enc, W_dec = (getattr(sae, name).data for name in ("W_enc", "W_dec"))
    threshold, b_enc = (getattr(sae, name).detach().clone() for name in ("threshold", "b_enc"))
    encoder_norm = ENCODER_SHARE * W_enc.norm(dim=0)[living].mean()
    decoder_norm = W_dec.norm(dim=1)[living].mean()
    encoders = (encoder_norm * functional.normalize(encoders, dim=1)).to(W_enc.dtype)
    W_enc[:, latents] = encoders.t()
    W_dec[latents] = (decoder_norm * functional.normalize(decoders, dim=1)).to(W_dec.dtype)
    threshold[latents] = THRESHOLD_SHARE * threshold[living].median()
    b_enc[latents] = -(encoders @ center.to(W_enc.dtype)).to(b_enc.dtype)
    set_value(sae, "threshold", threshold)
    set_value(sae, "b_enc", b_enc)
    if optimizer is None:
        return
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("threshold", 0), ("b_enc", 0)):
        moments = optimizer.state.get(stored(sae, name), {})
        if "exp_avg" in moments:
            moments["exp_avg"].index_fill_(axis, latents, 0.0)
        if "exp_avg_sq" in moments:
            squares = moments["exp_avg_sq"]
            of_each = squares if squares.ndim == 1 else squares.mean(dim=1 - axis)
            squares.index_fill_(axis, latents, of_each[living].mean())
