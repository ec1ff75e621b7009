"""Another L0 for a trained dictionary: its thresholds refitted, its directions kept.

The least error at a mean L0 of L0* is a constrained problem with one unknown a latent. At its
solution every latent pays the same price: raising θ_i by a little loses as much fidelity for each
activation it saves as raising any other (arXiv 2407.14435, section 4),

    E[I_i | z_i = θ_i] = λ,    I_i = 2 θ_i d_i · (x - x̂).

It is found by training the thresholds alone with `JumpReLUTrainingSAE`: the estimators' gradient to
θ_i is that difference, Adam moves each θ_i along it, and the L0 controller holds L0* and measures
λ. One shift of all thresholds, found exactly, starts the training at L0* and ends it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin.finetune import pretrained as released
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.parameters import Parameters

TRAINED = {
    "thresholds": ("threshold",),
    "decoder": ("threshold", "W_dec", "b_dec"),
    "all": ("threshold", "W_dec", "b_dec", "W_enc", "b_enc"),
}
# Adam's, for what is trained; docs/ablations.md has what they gave.
LEARNING_RATES = {"thresholds": 1e-2, "decoder": 3e-3, "all": 3e-3}
# L0 is measured on this many tokens: its standard error is then some 0.3 %.
L0_TOKENS = 32_768
# Tokens whose pre-activations exist at one time.
_TOKENS_PER_ENCODE = 1024


@dataclass(frozen=True)
class RefitSettings:
    """How a rung is trained.

    Attributes:
        train: `thresholds`; `decoder` for the decoder with them; `all` for the encoder too.
        steps: of training; 0 only shifts the thresholds.
        batch_tokens: tokens a step.
        lr: Adam's learning rate, in units where E‖x‖ = √d_in; it falls to 0 over the second half.
            None: `LEARNING_RATES`.
        seed: of the order of the tokens.
        device: where it is trained.
    """

    train: str = "thresholds"
    steps: int = 300
    batch_tokens: int = 2048
    lr: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ValueError(f"train is {self.train!r}; it must be one of {', '.join(TRAINED)}")
        if self.steps < 0 or self.batch_tokens < 1 or not self.rate > 0:
            raise ValueError(
                f"steps is {self.steps}, batch_tokens {self.batch_tokens} and lr {self.rate}; "
                "expected steps of 0 or more, at least one token, and a positive lr"
            )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNING_RATES[self.train] if self.lr is None else self.lr


def sweep_points(
    parameters: Parameters,
    targets: Sequence[float],
    rows: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
    each: Callable[[float], None] = lambda target: None,
) -> Iterator[tuple[float, Parameters]]:
    """The dictionary at every L0 of `targets`, each refitted from the one before.

    The targets below its own L0 come first, downwards from it, then those above it, upwards.

    Args:
        parameters: a dictionary on raw activations.
        rows: raw activations to fit on, in random order.
        each: called with a target before it is begun.

    Raises:
        ValueError: a target that is no L0, that no thresholds reach on these activations, or too
            few activations.
    """
    refuse_unreachable(parameters, targets, rows)
    own = mean_l0(parameters, rows)
    below = sorted((target for target in targets if target <= own), reverse=True)
    above = sorted(target for target in targets if target > own)
    for side in (below, above):
        at = parameters
        for target in side:
            each(target)
            at = refit(at, target, rows, settings)
            yield target, at


def refit(
    parameters: Parameters,
    target: float,
    rows: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
) -> Parameters:
    """The dictionary with L0 `target` on `rows`, of the least error that training finds.

    What is not trained comes back bit for bit. A decoder that is trained alone has b_dec folded
    out of the encoder first, so that the encoder does not move with it.

    Raises:
        ValueError: no thresholds reach the target, or there are too few rows for a batch.
    """
    if settings.train == "decoder":
        parameters = parameters.fold_b_dec()
    start = shifted(parameters, target, rows)
    if settings.steps == 0:
        return start
    return shifted(_trained(start, target, rows, settings), target, rows)


def shifted(
    parameters: Parameters, target: float, rows: Float[Tensor, "tokens d_in"]
) -> Parameters:
    """All thresholds raised by one number, in units of each latent's contribution to x̂.

    That number makes the mean L0 on `rows` the target; a threshold stops at 0, below which a
    latent's ReLU is.

    Raises:
        ValueError: the target is not reached with every threshold at 0.
    """
    rows, norms = rows[:L0_TOKENS], released.decoder_norms(parameters)
    wanted = round(target * len(rows))
    margins = _largest_margins(parameters.fold_decoder_norms(), rows, wanted)
    if len(margins) < wanted or wanted < 1:
        raise ValueError(_unreachable(target, len(margins) / len(rows)))
    # Between two pre-activations: on one, the order of a sum would decide which side it is on.
    last = margins.topk(min(wanted + 1, len(margins))).values[wanted - 1 :].mean()
    threshold = (parameters.threshold.double() + last.double() / norms).clamp_min(0.0)
    return replace(parameters, threshold=threshold.to(parameters.threshold.dtype))


@torch.no_grad()
def mean_l0(parameters: Parameters, rows: Float[Tensor, "tokens d_in"]) -> float:
    """Active latents a token, over the first `L0_TOKENS` rows."""
    rows = rows[:L0_TOKENS]
    active = sum(int(parameters.encode(x).count_nonzero()) for x in _pieces(rows))
    return active / len(rows)


@torch.no_grad()
def highest_l0(parameters: Parameters, rows: Float[Tensor, "tokens d_in"]) -> float:
    """L0 with every threshold at 0: the highest that thresholds alone reach."""
    return mean_l0(replace(parameters, threshold=torch.zeros_like(parameters.threshold)), rows)


def refuse_unreachable(
    parameters: Parameters, targets: Sequence[float], rows: Float[Tensor, "tokens d_in"]
) -> None:
    """Raise ValueError for targets that thresholds cannot reach, before anything is trained."""
    if not targets:
        raise ValueError("no L0 is asked for: give at least one, such as 10,20,40")
    if len(set(targets)) != len(targets):
        raise ValueError(f"an L0 is asked for twice: {', '.join(f'{t:g}' for t in targets)}")
    wrong = [target for target in targets if not 0 < target < math.inf]
    if wrong:
        raise ValueError(f"an L0 to refit to is {wrong[0]:g}; expected more than 0")
    highest = highest_l0(parameters, rows)
    if max(targets) > highest:
        raise ValueError(_unreachable(max(targets), highest))


def _unreachable(target: float, highest: float) -> str:
    return (
        f"L0 {target:g} is out of this dictionary's reach: with every threshold at 0, "
        f"{highest:.4g} latents of a token are active on average, and a threshold below 0 changes "
        f"nothing behind the ReLU. Ask for at most {math.floor(highest)}, or train a dictionary "
        "for it (`jumprelu finetune` with --target_l0)"
    )


@torch.no_grad()
def _largest_margins(
    parameters: Parameters, rows: Float[Tensor, "tokens d_in"], wanted: int
) -> Float[Tensor, " n"]:
    """At least the `wanted` + 1 largest z - θ over all tokens and latents with z > 0, or all.

    Values below the running `wanted`-th largest are dropped on the way, so that memory stays at a
    few times `wanted` numbers.
    """
    kept = torch.empty(0)
    lowest = -math.inf
    for x in _pieces(rows):
        z = parameters.pre_activations(x)
        within = z > (parameters.threshold + lowest).clamp_min(0.0)
        kept = torch.cat([kept, (z - parameters.threshold)[within]])
        if len(kept) > 4 * (wanted + 1):
            kept = kept.topk(wanted + 1).values
            lowest = float(kept[-1])
    return kept


def _pieces(rows: Float[Tensor, "tokens d_in"]) -> Iterator[Float[Tensor, "piece d_in"]]:
    return (piece.float() for piece in rows.split(_TOKENS_PER_ENCODE))


def _trained(
    start: Parameters,
    target: float,
    rows: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
) -> Parameters:
    """`start` after the training that `settings` describe."""
    batch = settings.batch_tokens
    if len(rows) < batch:
        raise ValueError(
            f"there are {len(rows)} activations and one batch takes {batch}: read more text, or "
            "set a smaller batch_tokens"
        )
    scale = start.d_in**0.5 / _mean_norm(rows)
    sae = _training_sae(released.scaled(start, scale, unit_rows=True), target, settings)
    SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=settings.steps * batch,
            train_batch_size_samples=batch,
            lr=settings.rate,
            lr_end=0.0,
            lr_decay_steps=settings.steps // 2,
            device=settings.device,
        ),
        sae=sae,
        data_provider=_batches(rows, scale, settings),
    ).fit()
    found = Parameters.of(sae)
    # The norms that rows were trained to, in the units that latents came in.
    norms = found.W_dec.double().norm(dim=1) * released.decoder_norms(start)
    found = found.fold_scales(scale).with_decoder_norms(norms)
    trained = {name: getattr(found, name) for name in TRAINED[settings.train]}
    return replace(start, **trained)


def _training_sae(
    parameters: Parameters, target: float, settings: RefitSettings
) -> JumpReLUTrainingSAE:
    trained = TRAINED[settings.train]
    cfg = JumpReLUTrainingSAEConfig(
        d_in=parameters.d_in,
        d_sae=parameters.d_sae,
        target_l0=target,
        apply_b_dec_to_input=parameters.subtracts_b_dec,
        normalize_activations="none",
        # Where the encoder is fixed, a row's norm is the latent's one gain.
        unit_norm_decoder="W_enc" in trained,
        jumprelu_ste_to_input="W_enc" in trained,
        # Every rung is the same dictionary: latent i means the same on all of them.
        resample_dead_latents=False,
        matryoshka_loss_weight=0.0,
        device=settings.device,
    )
    sae = JumpReLUTrainingSAE(cfg)
    released.load_(sae, parameters)
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(name in trained)
    return sae


def _mean_norm(rows: Float[Tensor, "tokens d_in"]) -> float:
    """Mean norm of the activations; raises ValueError where it is not a positive number."""
    mean = float(sum(float(x.norm(dim=1).sum()) for x in _pieces(rows))) / len(rows)
    if not 0 < mean < math.inf:
        raise ValueError(f"the activations' mean norm is {mean}; check the hook and the model")
    return mean


def _batches(
    rows: Float[Tensor, "tokens d_in"], scale: float, settings: RefitSettings
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Scaled batches without end, every token once before any comes again."""
    random = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_tokens
    while True:
        order = torch.randperm(len(rows), generator=random)
        for start in range(0, len(rows) - size + 1, size):
            yield scale * rows[order[start : start + size]].float().to(settings.device)
