"""Dead latents, resampled where the reconstruction is worst.

A latent that never fires gets no gradient from the reconstruction, and none from the estimators
once its pre-activations stay below its window. It is given a new direction: the residual of a token
that the dictionary reconstructs badly, drawn in proportion to the squared error (as in Anthropic,
"Towards Monosemanticity", 2023, appendix on neuron resampling). Its encoder reads what that token
has and others have not: an SAE's the same direction, softly whitened (`control.calibration`), a
transcoder's its input less the mean.

How it starts decides whether it survives (docs/ablations.md has the measurements). An encoder as
long as the living latents' gives activations that overshoot the residual; a threshold as high as
theirs leaves it firing too rarely to learn. And Adam divides a step by the root of its second
moment: with that set to zero, the first steps are several times the learning rate whatever the
gradient, and destroy the new direction. It is set to the living latents' mean.

Many may start in one step, and where one direction holds most of the variance, they all start along
it. They would then fire together on most tokens, and together overshoot: on a layer of Gemma 3 with
half of its variance in one coordinate, 336 of 2,048 resampled latents took L0 from 36 to 185 and
FVU from 0.09 to 5.8 in one step. So a threshold is raised until its latent fires on no more of the
batch than a few times the mean density, and the new encoders and thresholds are shortened together
until what they write is no longer than what reduces the batch's error most.

Not all data have a use for every latent: in 32 dimensions 64 active ones reconstruct better than
500, and a new one only takes firings from those. So a latent that would add to the batch's error by
itself stays dead, and is tried again with another token's residual at the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from jumprelu_plugin.control.units import set_value, stored
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess

# A latent at the average rate L0/d_sae misses this many firings in a row with a chance of e^-50.
PATIENCE_IN_FIRINGS = 50
# In steps. With fewer, a latent has not had the time to learn.
SHORTEST_PATIENCE = 12
# A latent that fails does so soon. One that has fired for long and falls silent is rare: it may be
# silent for a tenth of its age, up to four times the patience with a new one.
SILENCE_PER_AGE = 0.1
LONGEST_SILENCE = 4
# No latent is resampled below this share of the highest learning rate: it could no longer learn,
# and its firings count against the L0 that the others need (docs/ablations.md).
RESAMPLE_ABOVE_LR = 0.1
# Candidate tokens for each that is taken, and the exponent of `unexplained` in the choice.
CANDIDATES = 4
UNEXPLAINED_EXPONENT = 6
# Size of one piece of the product in `unexplained`.
PRODUCT_BYTES = 2**23
# Shares of the living encoders' mean norm and of the living latents' median threshold.
ENCODER_SHARE = 0.6
THRESHOLD_SHARE = 0.75
# Times the mean latent density L0/d_sae: the share of the batch a resampled latent may start on.
DENSEST_START = 2.0
# Of all latents: with twice the mean density, these fire a tenth of L0.
LARGEST_DRAW = 0.05
# Latents that may always be drawn.
SMALL_DRAW = 16
# New encoders are shortened no further: a shorter one would not learn.
SHORTEST = 0.05


def patience(d_sae: int, target_l0: float, batch: int) -> int:
    """Steps without firing after which a new latent counts as dead: at the mean rate it would have
    fired 50 times, and at least 12 steps."""
    return max(SHORTEST_PATIENCE, round(PATIENCE_IN_FIRINGS * d_sae / (target_l0 * batch)))


def longest_patience(d_sae: int, target_l0: float, batch: int) -> int:
    """Steps without firing after which any latent counts as dead, however long it has lived."""
    return LONGEST_SILENCE * patience(d_sae, target_l0, batch)


# (inputs of the encoder, residual, tokens) -> (new encoders, the input that gives them z = 0)
EncoderDirections = Callable[
    [Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"], Int[Tensor, " n"]],
    tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]],
]


class FiringRecord:
    """How long each latent has not fired, and whether that is long for its age.

    Attributes:
        silent: steps since each latent fired, [d_sae].
        lived: steps since each latent was initialized or resampled, [d_sae].
        steps: steps seen.
        checked: the step at which dead latents were last looked for.
        useless: the share of the latents tried at that step that would have added to the error.
        peak_lr: the highest learning rate seen.
    """

    def __init__(self, d_sae: int):
        self.silent: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self.lived: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        self.steps = self.checked = 0
        self.useless = self.peak_lr = 0.0

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
        allowed = (SILENCE_PER_AGE * self.lived).clamp(patience, LONGEST_SILENCE * patience)
        return self.silent >= allowed

    def may_resample(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the learning rate is still high enough for a latent to learn anything."""
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.peak_lr = max(self.peak_lr, lr)
        return lr >= RESAMPLE_ABOVE_LR * self.peak_lr

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside `tensors`."""
        return {"steps": self.steps, "checked": self.checked, "peak_lr": self.peak_lr}

    def tensors(self) -> dict[str, Int[Tensor, " d_sae"]]:
        """What a resumed run needs beside `state`, by name."""
        return {"silent": self.silent, "lived": self.lived}

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` and `tensors` gave."""
        self.steps, self.checked = state["steps"], state["checked"]
        self.peak_lr = state["peak_lr"]
        self.silent, self.lived = tensors["silent"], tensors["lived"]


@torch.no_grad()
def draw(
    dead: Bool[Tensor, " d_sae"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "held d_out"],
    seed: int,
    processes: OneProcess = ONE_PROCESS,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Dead latents and, for each, the token whose residual it takes.

    Tokens are drawn in proportion to their squared error, several for each latent, and among these
    the ones whose residual no living latent points along: what a living latent left out because it
    stayed below its threshold needs no second latent.

    No more latents are drawn than the batch has tokens with an error, no token twice, and at most
    one latent in twenty (or 16), so that their firings hardly move L0. `seed` alone decides, on
    every device: a resumed run draws what the uninterrupted one draws.

    Args:
        dead: of the whole dictionary.
        W_dec: this process's rows of it.
        processes: that hold the dictionary; all draw the same.
    """
    random = torch.Generator().manual_seed(seed)
    latents = dead.nonzero().flatten()
    error = residual.square().sum(1).cpu()
    wrong = int((error > 0).sum())
    count = min(len(latents), wrong, max(SMALL_DRAW, int(LARGEST_DRAW * len(dead))))
    chosen = torch.randperm(len(latents), generator=random)[:count]
    if not count:
        return latents[:0], latents[:0]
    tokens = torch.multinomial(error, min(CANDIDATES * count, wrong), generator=random)
    living = ~processes.part_of(dead)
    new = unexplained(residual[tokens.to(residual.device)], W_dec, living, processes).cpu()
    # Never zero: a residual along a living latent is drawn where there is no other.
    weight = new.pow(UNEXPLAINED_EXPONENT).clamp_min(1e-30)
    tokens = tokens[torch.multinomial(weight, count, generator=random)]
    return latents[chosen.to(latents.device)], tokens.to(latents.device)


def unexplained(
    vectors: Float[Tensor, "n d_out"],
    W_dec: Float[Tensor, "held d_out"],
    living: Bool[Tensor, " held"],
    processes: OneProcess = ONE_PROCESS,
) -> Float[Tensor, " n"]:
    """The share of each vector's squared norm that its best living latent would leave."""
    unit = functional.normalize(vectors, dim=1)
    best = unit.new_zeros(len(unit))
    rows = max(1, PRODUCT_BYTES // (4 * len(unit)))
    for start in range(0, len(W_dec), rows):
        piece = slice(start, start + rows)
        directions = functional.normalize(W_dec[piece][living[piece]].to(unit.dtype), dim=1)
        if len(directions):
            best = torch.maximum(best, (unit @ directions.t()).amax(1))
    return 1 - processes.max_over_shards(best).clamp(0, 1).square()


@torch.no_grad()
def resample_dead_(
    dictionary: nn.Module,
    firing: FiringRecord,
    patience: int,
    inputs: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    directions: EncoderDirections,
    optimizer: torch.optim.Optimizer,
    seed: int,
    mean_density: float,
    processes: OneProcess = ONE_PROCESS,
) -> None:
    """Look for dead latents and resample each where the residual of a batch is large.

    Args:
        dictionary: as for `resample_`.
        patience: steps without firing that a new latent is allowed.
        inputs, residual: of one batch.
        directions: given inputs, residual and the tokens drawn, the new encoders and their center.
        seed: of the draw; another for each layer, or all would take the same tokens.
        mean_density: L0/d_sae.
        processes: that hold the dictionary.
    """
    firing.checked = firing.steps
    own_dead = firing.dead(patience)
    dead = processes.gather_latents(own_dead)
    latents, tokens = draw(dead, residual, dictionary.W_dec, seed, processes)  # type: ignore[arg-type]
    encoders, center = directions(inputs, residual, tokens)
    started = resample_(
        dictionary,
        latents,
        encoders,
        residual[tokens],
        center,
        ~own_dead,
        optimizer,
        inputs=inputs,
        residual=residual,
        densest=DENSEST_START * mean_density,
        processes=processes,
    )
    _, own = processes.own(started)
    firing.silent[own] = firing.lived[own] = 0
    firing.useless = 1 - len(started) / len(latents) if len(latents) else 0.0


def unusual_inputs(
    inputs: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    tokens: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]]:
    """A transcoder's `EncoderDirections`: its residual lies in the output's space, so its encoders
    read what is unusual in these tokens' inputs."""
    mean = inputs.mean(0)
    return inputs[tokens] - mean, mean


@torch.no_grad()
def resample_(
    dictionary: nn.Module,
    latents: Int[Tensor, " n"],
    encoders: Float[Tensor, "n d_in"],
    decoders: Float[Tensor, "n d_out"],
    center: Float[Tensor, " d_in"],
    living: Bool[Tensor, " held"],
    optimizer: torch.optim.Optimizer | None,
    *,
    inputs: Float[Tensor, "batch d_in"] | None = None,
    residual: Float[Tensor, "batch d_out"] | None = None,
    densest: float = 1.0,
    processes: OneProcess = ONE_PROCESS,
) -> Int[Tensor, " started"]:
    """Give latents new directions (of any norm), with norms and thresholds taken from living ones.

    Args:
        dictionary: has W_enc, b_enc, W_dec and threshold, plain or parametrized (`control.units`).
        center: the encoder's input that gives the resampled latents z = 0.
        latents: places in the whole dictionary; `encoders` and `decoders` are of all of them.
        living: latents to measure norms, threshold and Adam's second moment on; all of them if
            none is alive.
        optimizer: Adam's first moment for these latents is set to 0, the second to the living
            latents' mean. None: there is none yet.
        inputs, residual: of one batch. Thresholds are raised so that a latent fires on at most
            `densest` of its tokens, latents that would add to its error are left as they are, and
            encoders are shortened so that the new latents together do not overshoot its residual.
        processes: that hold the dictionary. `living` and `dictionary` are of this one's latents.

    Returns:
        The latents that were given a new direction, of the whole dictionary.
    """
    if not len(latents):
        return latents
    if not processes.any_over_shards(living.any()):
        living = torch.ones_like(living)
    W_enc, W_dec = (getattr(dictionary, name).data for name in ("W_enc", "W_dec"))
    threshold, b_enc = (
        getattr(dictionary, name).detach().clone() for name in ("threshold", "b_enc")
    )
    encoder_norm = ENCODER_SHARE * processes.mean_over_shards(W_enc.norm(dim=0)[living])
    decoder_norm = processes.mean_over_shards(W_dec.norm(dim=1)[living])
    encoders = (encoder_norm * functional.normalize(encoders, dim=1)).to(W_enc.dtype)
    decoders = (decoder_norm * functional.normalize(decoders, dim=1)).to(W_dec.dtype)
    usual = processes.median_over_shards(threshold, living)
    start = (THRESHOLD_SHARE * usual).expand(len(latents))
    if inputs is not None and residual is not None:
        read = inputs - center
        start = torch.maximum(start, _threshold_at_density(read, encoders, densest))
        useful, short = _useful_and_length(read, residual, encoders, decoders, start)
        latents, encoders, decoders, start = (
            values[useful] for values in (latents, short * encoders, decoders, short * start)
        )
    bias = -(encoders @ center.to(W_enc.dtype))
    of_these, own = processes.own(latents)
    W_enc[:, own] = encoders[of_these].t()
    W_dec[own] = decoders[of_these]
    threshold[own] = start[of_these].to(threshold)
    b_enc[own] = bias[of_these].to(b_enc.dtype)
    set_value(dictionary, "threshold", threshold)
    set_value(dictionary, "b_enc", b_enc)
    if optimizer is None:
        return latents
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("threshold", 0), ("b_enc", 0)):
        moments = optimizer.state.get(stored(dictionary, name), {})
        if "exp_avg" in moments:
            moments["exp_avg"].index_fill_(axis, own, 0.0)
        if "exp_avg_sq" in moments:
            squares = moments["exp_avg_sq"]
            of_each = squares if squares.ndim == 1 else squares.mean(dim=1 - axis)
            squares.index_fill_(axis, own, processes.mean_over_shards(of_each[living]))
    return latents


def _threshold_at_density(
    inputs: Float[Tensor, "batch d_in"], encoders: Float[Tensor, "n d_in"], density: float
) -> Float[Tensor, " n"]:
    """For each encoder, the threshold that this share of the inputs exceeds, and one of them."""
    exceed = min(max(1, int(density * len(inputs))), len(inputs) - 1)
    rows = max(1, PRODUCT_BYTES // (4 * len(inputs)))
    pieces = []
    for piece in encoders.split(rows):
        top = (inputs.to(piece.dtype) @ piece.t()).topk(exceed + 1, dim=0).values
        pieces.append(0.5 * (top[-1] + top[-2]))
    return torch.cat(pieces)


def _useful_and_length(
    inputs: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    encoders: Float[Tensor, "n d_in"],
    decoders: Float[Tensor, "n d_out"],
    threshold: Float[Tensor, " n"],
) -> tuple[Bool[Tensor, " n"], float]:
    """Whether each of these latents alone reduces the batch's squared error, and the factor, at
    most 1, by which what those that do write together fits the residual best."""
    useful = []
    written = torch.zeros_like(residual)
    rows = max(1, PRODUCT_BYTES // (4 * len(inputs)))
    pieces = zip(encoders.split(rows), decoders.split(rows), threshold.split(rows), strict=True)
    for encoder, decoder, theta in pieces:
        z = inputs.to(encoder.dtype) @ encoder.t()
        acts = z * (z > theta)
        towards = (acts * (residual.to(encoder.dtype) @ decoder.to(encoder.dtype).t())).sum(0)
        alone = acts.square().sum(0) * decoder.to(encoder.dtype).square().sum(1)
        useful.append(2 * towards > alone)
        kept, rest = acts[:, useful[-1]], decoder[useful[-1]]
        written += kept.to(residual.dtype) @ rest.to(residual.dtype)
    length = written.square().sum()
    best = (written * residual).sum() / length if length > 0 else length.new_ones(())
    return torch.cat(useful), float(best.clamp(SHORTEST, 1.0))
